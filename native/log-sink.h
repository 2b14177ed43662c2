// Where ggml and llama.cpp log to. Nothing is printed; error lines are kept for the exception that a
// failed call becomes, and the lines that say where a model's weights went. Native on purpose: a callback in Python
// would swallow a Ctrl-C during a load.

#pragma once

#include "ggml.h"

#include <string>

namespace omnivlm {

// A ggml_log_callback.
void log_sink(ggml_log_level level, const char * text, void * user_data);

// The first error line that was logged on this thread since the last call, without the name of the
// function that logged it; empty if there was none.
std::string take_log_error();

// The lines in which llama.cpp says how much of a model it put into which memory, logged on this
// thread since the last call.
std::string take_log_placement();

}  // namespace omnivlm
