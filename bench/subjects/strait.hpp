// The files of the subject strait: channels between processes (strait.cpp), tasks (strait_task.cpp), and channels
// inside an Asio application (strait_asio.cpp).
#pragma once

#include "../subject.hpp"

namespace bench {

void run_strait_task(end& self);
void run_strait_asio(end& self);

}  // namespace bench
