// Failures of the kernel as JS errors: facts only (errno, its name, system call, subject); remedies are worded in src/errors.ts.
#pragma once

#include <napi.h>

#include <cerrno>
#include <string>

/* Throws. `error` is a positive errno. `log`, when not empty, is what the verifier or libbpf said. */
[[noreturn]] void ThrowErrno(Napi::Env env, int error, const char* syscall, const std::string& subject, const std::string& log = "");

/* For calls made before, by -1 and errno or by libbpf's negative errno. */
inline void CheckErrno(Napi::Env env, long result, int error, const char* syscall, const std::string& subject) {
	if (result < 0) {
		ThrowErrno(env, error, syscall, subject);
	}
}

/* Makes the call here, as errno would be read too early in an argument beside it: their order is unspecified. */
template <typename Call>
auto Checked(Napi::Env env, const char* syscall, const std::string& subject, Call call) {
	auto result = call();
	if (result < 0) {
		ThrowErrno(env, errno, syscall, subject);
	}
	return result;
}
