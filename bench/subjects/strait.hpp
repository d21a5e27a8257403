// The two files of the subject strait: channels between processes (strait.cpp), and inside an Asio application
// (strait_asio.cpp).
#pragma once

#include "../subject.hpp"

namespace bench {

void run_strait_ready(end& self);

}  // namespace bench
