// TLS in a strait::task: a handshake, data both ways and a farewell between two ends of a socket pair, beside channels.
#include <strait/asio.hpp>

#include <doctest/doctest.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <array>
#include <asio/buffer.hpp>
#include <asio/io_context.hpp>
#include <asio/local/connect_pair.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/read.hpp>
#include <asio/ssl.hpp>
#include <asio/write.hpp>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

import strait;

namespace {

using socket_type = asio::local::stream_protocol::socket;
using stream_type = asio::ssl::stream<socket_type>;
using strait::use_op;

template <auto Free>
struct freed_by {
  template <class T>
  void operator()(T* object) const noexcept {
    Free(object);
  }
};
using key_type = std::unique_ptr<::EVP_PKEY, freed_by<&::EVP_PKEY_free>>;
using certificate_type = std::unique_ptr<::X509, freed_by<&::X509_free>>;
using memory_type = std::unique_ptr<::BIO, freed_by<&::BIO_free>>;

void must(bool went_well, const char* what) {
  if (!went_well) throw std::runtime_error{std::string{"OpenSSL: "} + what};
}

std::string text_of(::BIO* memory) {
  char* text = nullptr;
  const long length = ::BIO_get_mem_data(memory, &text);
  return {text, static_cast<std::size_t>(length)};
}

/// A key and a certificate for it that it signed itself, as PEM.
struct identity {
  std::string key;
  std::string certificate;

  explicit identity(const std::string& name) {
    const key_type pair{::EVP_EC_gen("P-256")};
    const certificate_type made{::X509_new()};
    must(pair && made, "no key or certificate");
    must(::X509_set_version(made.get(), X509_VERSION_3) == 1, "version");
    must(::ASN1_INTEGER_set(::X509_get_serialNumber(made.get()), 1) == 1, "serial number");
    // From an hour ago, so that no two clocks need agree, for a day.
    ::X509_gmtime_adj(::X509_getm_notBefore(made.get()), -3'600);
    ::X509_gmtime_adj(::X509_getm_notAfter(made.get()), 86'400);
    must(::X509_set_pubkey(made.get(), pair.get()) == 1, "public key");
    ::X509_NAME* subject = ::X509_get_subject_name(made.get());
    must(::X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>(name.c_str()),
                                      -1, -1, 0) == 1,
         "name");
    must(::X509_set_issuer_name(made.get(), subject) == 1, "issuer");
    must(::X509_sign(made.get(), pair.get(), ::EVP_sha256()) > 0, "signature");
    const memory_type key_text{::BIO_new(::BIO_s_mem())};
    const memory_type certificate_text{::BIO_new(::BIO_s_mem())};
    must(::PEM_write_bio_PrivateKey(key_text.get(), pair.get(), nullptr, nullptr, 0, nullptr, nullptr) == 1, "key");
    must(::PEM_write_bio_X509(certificate_text.get(), made.get()) == 1, "certificate");
    key = text_of(key_text.get());
    certificate = text_of(certificate_text.get());
  }
};

asio::ssl::context server_that_is(const identity& who) {
  asio::ssl::context made{asio::ssl::context::tls_server};
  made.use_certificate(asio::buffer(who.certificate), asio::ssl::context::pem);
  made.use_private_key(asio::buffer(who.key), asio::ssl::context::pem);
  return made;
}

asio::ssl::context client_that_expects(const identity& whom) {
  asio::ssl::context made{asio::ssl::context::tls_client};
  made.set_verify_mode(asio::ssl::verify_peer);
  made.add_certificate_authority(asio::buffer(whom.certificate));
  return made;
}

/// Answers each line with itself, until the client says farewell; what it answered goes into a channel.
strait::task<> serve(stream_type stream, strait::sender<std::size_t> answered) {
  co_await stream.async_handshake(asio::ssl::stream_base::server, use_op);
  std::array<char, 256> buffer;
  for (;;) {
    std::error_code error;
    const std::size_t n = co_await stream.async_read_some(asio::buffer(buffer), use_op(error));
    if (error == asio::error::eof) break;  // a farewell, not merely a connection that ended
    if (error) throw std::system_error{error};
    co_await asio::async_write(stream, asio::buffer(buffer, n), use_op);
    co_await answered.send(n);
  }
  co_await stream.async_shutdown(use_op);
}

strait::task<> ask(stream_type stream, std::size_t& bytes) {
  co_await stream.async_handshake(asio::ssl::stream_base::client, use_op);
  for (int i = 0; i < 20; ++i) {
    const std::string question = "question " + std::to_string(i);
    std::string answer(question.size(), ' ');
    co_await asio::async_write(stream, asio::buffer(question), use_op);
    co_await asio::async_read(stream, asio::buffer(answer), use_op);
    if (answer != question) throw std::runtime_error{"a wrong answer"};
    bytes += answer.size();
  }
  co_await stream.async_shutdown(use_op);
}

strait::task<> count(strait::receiver<std::size_t> answered, std::size_t& bytes) {
  while (const auto n = co_await answered.recv()) bytes += *n;
}

}  // namespace

TEST_CASE("a TLS connection between two tasks, beside a channel") {
  const identity server{"strait.test"};
  asio::ssl::context server_side = server_that_is(server);
  asio::ssl::context client_side = client_that_expects(server);

  asio::io_context context{1};
  socket_type near{context};
  socket_type far{context};
  asio::local::connect_pair(near, far);
  auto [tx, rx] = strait::make_channel<std::size_t>({.capacity = 2});
  std::size_t asked = 0;
  std::size_t answered = 0;
  strait::spawn(context, serve(stream_type{std::move(far), server_side}, std::move(tx)));
  strait::spawn(context, ask(stream_type{std::move(near), client_side}, asked));
  strait::spawn(context, count(std::move(rx), answered));
  context.run();
  CHECK(asked > 20 * 9);
  CHECK(answered == asked);
}

TEST_CASE("a server that cannot show who it is: the handshake's error is thrown") {
  asio::ssl::context server_side = server_that_is(identity{"strait.test"});
  asio::ssl::context client_side = client_that_expects(identity{"strait.test"});  // of the same name, but another

  asio::io_context context{1};
  socket_type near{context};
  socket_type far{context};
  asio::local::connect_pair(near, far);
  std::error_code refused;
  strait::spawn(context, [](stream_type stream) -> strait::task<> {
    std::error_code alert;
    co_await stream.async_handshake(asio::ssl::stream_base::server, use_op(alert));
    CHECK(alert);
  }(stream_type{std::move(far), server_side}));
  strait::spawn(context, [](stream_type stream, std::error_code& got) -> strait::task<> {
    try {
      co_await stream.async_handshake(asio::ssl::stream_base::client, use_op);
    } catch (const std::system_error& error) {
      got = error.code();
    }
  }(stream_type{std::move(near), client_side}, refused));
  context.run();
  CHECK(refused.category() == asio::error::get_ssl_category());
}
