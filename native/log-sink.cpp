#include "log-sink.h"

#include <cstring>
#include <utility>

namespace omnivlm {
namespace {

constexpr size_t MAX_TEXT = 4096;

std::string & collected() {
    thread_local std::string text;
    return text;
}

std::string & placement() {
    thread_local std::string text;
    return text;
}

}  // namespace

void log_sink(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && collected().size() < MAX_TEXT) {
        collected() += text;
    }
    if (std::strstr(text, " model buffer size ") != nullptr && placement().size() < MAX_TEXT) {
        placement() += text;
    }
}

std::string take_log_error() {
    const std::string line  = collected().substr(0, collected().find('\n'));
    const size_t      colon = line.find(": ");
    collected().clear();
    return colon == std::string::npos ? line : line.substr(colon + 2);
}

std::string take_log_placement() {
    return std::exchange(placement(), {});
}

}  // namespace omnivlm
