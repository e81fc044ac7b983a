#ifndef ZQFP_EMBED_SHA256_H
#define ZQFP_EMBED_SHA256_H

#include <istream>
#include <string>

namespace zqfp {

// The SHA-256 of everything that is left in `input`, 64 hexadecimal digits (FIPS 180-4).
std::string Sha256(std::istream& input);

}  // namespace zqfp

#endif
