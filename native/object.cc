#include <bpf/btf.h>
#include <bpf/libbpf.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <mutex>

#include "arguments.h"
#include "classes.h"

/* libbpf has one print function for the process; it finds the text of the load in progress on this thread. */
static thread_local std::string* log_of_thread = nullptr;

static int CollectLog(libbpf_print_level level, const char* format, va_list arguments) {
	if (!log_of_thread || level == LIBBPF_DEBUG) {
		return 0;
	}
	va_list again;
	va_copy(again, arguments);
	int size = vsnprintf(nullptr, 0, format, again);
	va_end(again);
	if (size > 0) {
		size_t before = log_of_thread->size();
		log_of_thread->resize(before + static_cast<size_t>(size) + 1);
		vsnprintf(log_of_thread->data() + before, static_cast<size_t>(size) + 1, format, arguments);
		log_of_thread->resize(before + static_cast<size_t>(size));
	}
	return size;
}

LibbpfLog::LibbpfLog() {
	static std::once_flag once;
	std::call_once(once, [] { libbpf_set_print(CollectLog); });
	log_of_thread = &text_;
}

LibbpfLog::~LibbpfLog() { log_of_thread = nullptr; }

Napi::Function Object::Define(Napi::Env env) {
	return DefineClass(env, "BpfObject", {
		InstanceMethod<&Object::GetBtf>("btf"),
		InstanceMethod<&Object::Maps>("maps"),
		InstanceMethod<&Object::Programs>("programs"),
		InstanceMethod<&Object::Globals>("globals"),
		InstanceMethod<&Object::SetGlobals>("setGlobals"),
		InstanceMethod<&Object::SetMaxEntries>("setMaxEntries"),
		InstanceMethod<&Object::ReuseMap>("reuseMap"),
		InstanceMethod<&Object::SetAutoload>("setAutoload"),
		InstanceMethod<&Object::Load>("load"),
		InstanceMethod<&Object::GetMap>("map"),
		InstanceMethod<&Object::GetProgram>("program"),
		InstanceMethod<&Object::Close>("close"),
	});
}

Object::Object(const Napi::CallbackInfo& info) : ObjectWrap(info), Handle(info.Env()) {
	Napi::Env env = info.Env();
	LibbpfLog log;
	LIBBPF_OPTS(bpf_object_open_opts, opts);
	try {
		if (info[0].IsString()) {
			std::string path = info[0].As<Napi::String>().Utf8Value();
			name_ = info[1].IsUndefined() ? path : TextArgument(info, 1, "name");
			object_ = bpf_object__open_file(path.c_str(), &opts);
		} else {
			Bytes bytes = BytesArgument(info, 0, "source");
			name_ = info[1].IsUndefined() ? "object" : TextArgument(info, 1, "name");
			opts.object_name = name_.c_str();
			object_ = bpf_object__open_mem(bytes.data, bytes.size, &opts);
		}
		if (!object_) {
			ThrowErrno(env, errno, "bpf_object__open", name_, log.text());
		}
	} catch (...) {
		CloseOnce();
		throw;
	}
}

void Object::Release() {
	bpf_object__close(object_);
	object_ = nullptr;
}

bpf_object* Object::Require(Napi::Env env, bool loaded, const char* what) {
	RequireOpen(env, "object");
	if (loaded != loaded_) {
		ThrowErrno(env, EBUSY, what, name_ + (loaded ? " (not loaded yet)" : " (loaded already)"));
	}
	return object_;
}

bpf_map* Object::FindMap(Napi::Env env, const std::string& name) {
	bpf_map* map = bpf_object__find_map_by_name(object_, name.c_str());
	if (!map) {
		ThrowErrno(env, ENOENT, "bpf_object__find_map_by_name", name);
	}
	return map;
}

bpf_program* Object::FindProgram(Napi::Env env, const std::string& name) {
	bpf_program* program = bpf_object__find_program_by_name(object_, name.c_str());
	if (!program) {
		ThrowErrno(env, ENOENT, "bpf_object__find_program_by_name", name);
	}
	return program;
}

Napi::Value Object::GetBtf(const Napi::CallbackInfo& info) {
	RequireOpen(info.Env(), "object");
	const btf* types = bpf_object__btf(object_);
	uint32_t size = 0;
	const void* raw = types ? btf__raw_data(types, &size) : nullptr;
	if (!raw) {
		ThrowErrno(info.Env(), ENOENT, "bpf_object__btf", name_);
	}
	return CopyBytes(info.Env(), raw, size);
}

Napi::Value Object::Maps(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	RequireOpen(env, "object");
	Napi::Array result = Napi::Array::New(env);
	bpf_map* map;
	bpf_object__for_each_map(map, object_) {
		if (bpf_map__is_internal(map)) {
			continue;
		}
		Napi::Object spec = Napi::Object::New(env);
		spec.Set("name", bpf_map__name(map));
		spec.Set("type", static_cast<uint32_t>(bpf_map__type(map)));
		spec.Set("keySize", bpf_map__key_size(map));
		spec.Set("valueSize", bpf_map__value_size(map));
		spec.Set("maxEntries", bpf_map__max_entries(map));
		spec.Set("flags", bpf_map__map_flags(map));
		result.Set(result.Length(), spec);
	}
	return result;
}

Napi::Value Object::Programs(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	RequireOpen(env, "object");
	Napi::Array result = Napi::Array::New(env);
	bpf_program* program;
	bpf_object__for_each_program(program, object_) {
		Napi::Object spec = Napi::Object::New(env);
		spec.Set("name", bpf_program__name(program));
		spec.Set("section", bpf_program__section_name(program));
		spec.Set("type", static_cast<uint32_t>(bpf_program__type(program)));
		spec.Set("attachType", static_cast<uint32_t>(bpf_program__expected_attach_type(program)));
		result.Set(result.Length(), spec);
	}
	return result;
}

Napi::Value Object::Globals(const Napi::CallbackInfo& info) {
	RequireOpen(info.Env(), "object");
	std::string section = TextArgument(info, 0, "section");
	size_t size = 0;
	const void* value = bpf_map__initial_value(FindMap(info.Env(), section), &size);
	if (!value) {
		ThrowErrno(info.Env(), ENOENT, "bpf_map__initial_value", section);
	}
	return CopyBytes(info.Env(), value, size);
}

Napi::Value Object::SetGlobals(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Require(env, false, "bpf_map__set_initial_value");
	std::string section = TextArgument(info, 0, "section");
	bpf_map* map = FindMap(env, section);
	size_t size = 0;
	bpf_map__initial_value(map, &size);
	Bytes bytes = BytesArgument(info, 1, "bytes", size);
	int error = bpf_map__set_initial_value(map, bytes.data, bytes.size);
	CheckErrno(env, error, -error, "bpf_map__set_initial_value", section);
	return env.Undefined();
}

Napi::Value Object::SetMaxEntries(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Require(env, false, "bpf_map__set_max_entries");
	std::string name = TextArgument(info, 0, "map");
	uint32_t entries = static_cast<uint32_t>(IntegerArgument(info, 1, "maxEntries", 1, UINT32_MAX));
	int error = bpf_map__set_max_entries(FindMap(env, name), entries);
	CheckErrno(env, error, -error, "bpf_map__set_max_entries", name);
	return env.Undefined();
}

Napi::Value Object::ReuseMap(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Require(env, false, "bpf_map__reuse_fd");
	std::string name = TextArgument(info, 0, "name");
	Map& map = Map::From(info, 1, "map");
	bpf_map* ours = FindMap(env, name);
	const bpf_map_info& theirs = map.spec();
	map.fd(env);
	/* libbpf would take the other map's shape over in silence; the programs were compiled for this one. */
	if (static_cast<uint32_t>(bpf_map__type(ours)) != theirs.type || bpf_map__key_size(ours) != theirs.key_size || bpf_map__value_size(ours) != theirs.value_size) {
		ThrowErrno(env, EINVAL, "bpf_map__reuse_fd", name);
	}
	int error = bpf_map__reuse_fd(ours, map.fd(env));
	CheckErrno(env, error, -error, "bpf_map__reuse_fd", name);
	return env.Undefined();
}

Napi::Value Object::SetAutoload(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Require(env, false, "bpf_program__set_autoload");
	std::string name = TextArgument(info, 0, "program");
	int error = bpf_program__set_autoload(FindProgram(env, name), info[1].ToBoolean().Value());
	CheckErrno(env, error, -error, "bpf_program__set_autoload", name);
	return env.Undefined();
}

/* The program or map that libbpf's words are about: `prog 'name': …` comes last, and only when a program is at fault. */
static std::string Culprit(const std::string& log, const char* kind) {
	size_t start = log.find(kind);
	size_t end = start == std::string::npos ? start : log.find('\'', start + strlen(kind));
	return end == std::string::npos ? "" : log.substr(start + strlen(kind), end - start - strlen(kind));
}

Napi::Value Object::Load(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Require(env, false, "bpf_object__load");
	/* Without a buffer of ours libbpf asks for the verifier's log only after a refusal, and hands it to the print function. */
	LibbpfLog log;
	if (int error = bpf_object__load(object_)) {
		std::string program = Culprit(log.text(), "prog '"), map = Culprit(log.text(), "map '");
		if (!program.empty()) {
			ThrowErrno(env, -error, "bpf(BPF_PROG_LOAD)", name_ + " program " + program, log.text());
		}
		if (!map.empty()) {
			ThrowErrno(env, -error, "bpf(BPF_MAP_CREATE)", name_ + " map " + map, log.text());
		}
		ThrowErrno(env, -error, "bpf_object__load", name_, log.text());
	}
	loaded_ = true;
	return env.Undefined();
}

/* An fd of its own: the handle outlives the object. */
static int Duplicate(Napi::Env env, int fd, const std::string& subject) {
	int copy = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (copy < 0) {
		ThrowErrno(env, fd < 0 ? ENOENT : errno, "fcntl(F_DUPFD_CLOEXEC)", subject);
	}
	return copy;
}

Napi::Value Object::GetMap(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Require(env, true, "map");
	std::string name = TextArgument(info, 0, "name");
	return Map::Wrap(env, Duplicate(env, bpf_map__fd(FindMap(env, name)), name), "map " + name);
}

Napi::Value Object::GetProgram(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Require(env, true, "program");
	std::string name = TextArgument(info, 0, "name");
	bpf_program* program = FindProgram(env, name);
	return Program::Wrap(env, Duplicate(env, bpf_program__fd(program), name), bpf_program__expected_attach_type(program), "program " + name);
}

Napi::Value Object::Close(const Napi::CallbackInfo& info) {
	CloseOnce();
	return info.Env().Undefined();
}
