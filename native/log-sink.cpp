#include "log-sink.h"

namespace omnivlm {
namespace {

constexpr size_t MAX_TEXT = 4096;

std::string & collected() {
    thread_local std::string text;
    return text;
}

}  // namespace

void log_sink(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && collected().size() < MAX_TEXT) {
        collected() += text;
    }
}

std::string take_log_error() {
    const std::string line  = collected().substr(0, collected().find('\n'));
    const size_t      colon = line.find(": ");
    collected().clear();
    return colon == std::string::npos ? line : line.substr(colon + 2);
}

}  // namespace omnivlm
