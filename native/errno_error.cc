#include "errno_error.h"

#include <cstring>

/* The kernel's own errno for "not supported", which it does not export to user space but returns all the same. */
static constexpr int kEnotsupp = 524;

[[noreturn]] void ThrowErrno(Napi::Env env, int error, const char* syscall, const std::string& subject, const std::string& log) {
	const char* name = error == kEnotsupp ? "ENOTSUPP" : strerrorname_np(error);
	const char* words = error == kEnotsupp ? "operation is not supported" : strerrordesc_np(error);
	std::string code = name ? name : std::to_string(error);
	std::string text = words ? words : "unknown error";
	text[0] = static_cast<char>(tolower(text[0]));

	Napi::Error js = Napi::Error::New(env, std::string(syscall) + " " + subject + ": " + code + ": " + text);
	js.Set("errno", Napi::Number::New(env, error));
	js.Set("code", Napi::String::New(env, code));
	js.Set("syscall", Napi::String::New(env, syscall));
	js.Set("subject", Napi::String::New(env, subject));
	if (!log.empty()) {
		js.Set("log", Napi::String::New(env, log));
	}
	throw js;
}
