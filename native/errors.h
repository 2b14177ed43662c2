// The native half of the error tree in src/omnivlm_edge/errors.py; bindings.cpp maps one to the other.

#pragma once

#include <stdexcept>

namespace omnivlm {

struct ModelFileError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct DeviceError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace omnivlm
