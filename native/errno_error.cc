#include "errno_error.h"

#include <bpf/libbpf.h>

#include <cctype>
#include <cstring>

/* The kernel's own errno for "not supported", which it does not export to user space but returns all the same. */
static constexpr int kEnotsupp = 524;

/* libbpf's own errors begin at 4000 (libbpf.h, enum libbpf_errno): a file that is no BPF object, mostly. */
static const char* LibbpfErrorName(int error) {
	static constexpr const char* kNames[] = {
		"LIBBPF_ERRNO__LIBELF", "LIBBPF_ERRNO__FORMAT", "LIBBPF_ERRNO__KVERSION", "LIBBPF_ERRNO__ENDIAN", "LIBBPF_ERRNO__INTERNAL",
		"LIBBPF_ERRNO__RELOC", "LIBBPF_ERRNO__LOAD", "LIBBPF_ERRNO__VERIFY", "LIBBPF_ERRNO__PROG2BIG", "LIBBPF_ERRNO__KVER",
		"LIBBPF_ERRNO__PROGTYPE", "LIBBPF_ERRNO__WRNGPID", "LIBBPF_ERRNO__INVSEQ", "LIBBPF_ERRNO__NLPARSE"};
	size_t index = static_cast<size_t>(error - __LIBBPF_ERRNO__START);
	return index < sizeof(kNames) / sizeof(*kNames) ? kNames[index] : nullptr;
}

[[noreturn]] void ThrowErrno(Napi::Env env, int error, const char* syscall, const std::string& subject, const std::string& log) {
	const char* name = error == kEnotsupp ? "ENOTSUPP" : strerrorname_np(error);
	const char* words = error == kEnotsupp ? "operation is not supported" : strerrordesc_np(error);
	char libbpf_words[128] = "unknown error";
	if (!name && error >= __LIBBPF_ERRNO__START) {
		name = LibbpfErrorName(error);
		libbpf_strerror(error, libbpf_words, sizeof(libbpf_words));
	}
	std::string code = name ? name : std::to_string(error);
	std::string text = words ? words : libbpf_words;
	/* Not of an abbreviation. */
	if (text.size() > 1 && islower(text[1])) {
		text[0] = static_cast<char>(tolower(text[0]));
	}

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
