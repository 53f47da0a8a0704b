// Failures of the kernel as JS errors: facts only (errno, its name, system call, subject); remedies are worded in src/errors.ts.
#pragma once

#include <napi.h>

#include <string>

/* Throws. `error` is a positive errno. `log`, when not empty, is what the verifier or libbpf said. */
[[noreturn]] void ThrowErrno(Napi::Env env, int error, const char* syscall, const std::string& subject, const std::string& log = "");

/* For calls that give -1 and errno, or a negative errno, by libbpf's convention. */
inline void CheckErrno(Napi::Env env, long result, int error, const char* syscall, const std::string& subject) {
	if (result < 0) {
		ThrowErrno(env, error, syscall, subject);
	}
}
