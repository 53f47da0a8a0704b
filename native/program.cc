#include <bpf/bpf.h>

#include <cerrno>
#include <cstdio>
#include <fcntl.h>
#include <unistd.h>
#include <vector>

#include "arguments.h"
#include "classes.h"

Napi::Function Program::Define(Napi::Env env) {
	return DefineClass(env, "BpfProgram", {
		InstanceMethod<&Program::Info>("info"),
		InstanceMethod<&Program::Pin>("pin"),
		InstanceMethod<&Program::AttachCgroup>("attachCgroup"),
		InstanceMethod<&Program::AttachNetns>("attachNetns"),
		InstanceMethod<&Program::AttachMap>("attachMap"),
		InstanceMethod<&Program::AttachMapLegacy>("attachMapLegacy"),
		InstanceMethod<&Program::DetachMap>("detachMap"),
		InstanceMethod<&Program::TestRun>("testRun"),
		InstanceMethod<&Program::Close>("close"),
		InstanceAccessor<&Program::Fd>("fd"),
	});
}

Napi::Object Program::Wrap(Napi::Env env, int fd, int attach_type, const std::string& subject) {
	return Adopt(env, &Instance::program, {fd, attach_type, subject});
}

Program& Program::From(const Napi::CallbackInfo& info, size_t index, const char* name) {
	if (!info[index].IsObject() || !info[index].As<Napi::Object>().InstanceOf(Instance::Of(info.Env()).program.Value())) {
		throw Napi::TypeError::New(info.Env(), std::string("Expected `") + name + "` to be a BpfProgram");
	}
	return *Program::Unwrap(info[index].As<Napi::Object>());
}

Program::Program(const Napi::CallbackInfo& info) : ObjectWrap(info), FdHandle(info.Env()) {}

Napi::Value Program::Fd(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), fd(info.Env())); }

Napi::Value Program::Info(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	uint32_t map_ids[64];
	bpf_prog_info now{};
	now.map_ids = reinterpret_cast<uint64_t>(map_ids);
	now.nr_map_ids = 64;
	uint32_t size = sizeof(now);
	if (bpf_obj_get_info_by_fd(fd(env), &now, &size)) {
		ThrowErrno(env, errno, "bpf(BPF_OBJ_GET_INFO_BY_FD)", subject());
	}
	char tag[2 * sizeof(now.tag) + 1];
	for (size_t i = 0; i < sizeof(now.tag); i++) {
		snprintf(tag + 2 * i, 3, "%02x", now.tag[i]);
	}
	Napi::Array maps = Napi::Array::New(env);
	for (uint32_t i = 0; i < std::min<uint32_t>(now.nr_map_ids, 64); i++) {
		maps.Set(i, map_ids[i]);
	}
	Napi::Object result = Napi::Object::New(env);
	result.Set("id", now.id);
	result.Set("name", now.name);
	result.Set("type", now.type);
	result.Set("tag", tag);
	result.Set("loadedAtNs", Napi::BigInt::New(env, static_cast<uint64_t>(now.load_time)));
	result.Set("runCount", Napi::BigInt::New(env, static_cast<uint64_t>(now.run_cnt)));
	result.Set("runTimeNs", Napi::BigInt::New(env, static_cast<uint64_t>(now.run_time_ns)));
	result.Set("mapIds", maps);
	return result;
}

Napi::Value Program::Pin(const Napi::CallbackInfo& info) {
	std::string path = TextArgument(info, 0, "path");
	if (bpf_obj_pin(fd(info.Env()), path.c_str())) {
		ThrowErrno(info.Env(), errno, "bpf(BPF_OBJ_PIN)", path);
	}
	return info.Env().Undefined();
}

bpf_attach_type Program::AttachType(const Napi::CallbackInfo& info, size_t index) {
	if (info[index].IsUndefined() && attach_type() < 0) {
		throw Napi::TypeError::New(info.Env(), "Expected `attachType`: a program opened from a pin or by id does not know its own");
	}
	return static_cast<bpf_attach_type>(IntegerArgumentOr(info, index, "attachType", attach_type()));
}

Napi::Value Program::CreateLink(Napi::Env env, int target_fd, bpf_attach_type type, const std::string& target) {
	int link = bpf_link_create(fd(env), target_fd, type, nullptr);
	if (link < 0) {
		ThrowErrno(env, errno, "bpf(BPF_LINK_CREATE)", subject() + " to " + target);
	}
	return Link::Wrap(env, link, subject() + " on " + target);
}

Napi::Value Program::AttachCgroup(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	fd(env);
	std::string path = TextArgument(info, 0, "cgroupPath");
	bpf_attach_type type = AttachType(info, 1);
	int cgroup = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (cgroup < 0) {
		ThrowErrno(env, errno, "open", path);
	}
	int link = bpf_link_create(fd(env), cgroup, type, nullptr);
	int error = errno;
	close(cgroup);
	CheckErrno(env, link, error, "bpf(BPF_LINK_CREATE)", subject() + " to " + path);
	return Link::Wrap(env, link, subject() + " on " + path);
}

Napi::Value Program::AttachNetns(const Napi::CallbackInfo& info) {
	fd(info.Env());
	int netns = FdArgument(info, 0, "netnsFd");
	return CreateLink(info.Env(), netns, AttachType(info, 1), "network namespace");
}

Napi::Value Program::AttachMap(const Napi::CallbackInfo& info) {
	fd(info.Env());
	Map& map = Map::From(info, 0, "map");
	return CreateLink(info.Env(), map.fd(info.Env()), AttachType(info, 1), map.subject());
}

Napi::Value Program::AttachMapLegacy(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Map& map = Map::From(info, 0, "map");
	if (bpf_prog_attach(fd(env), map.fd(env), AttachType(info, 1), 0)) {
		ThrowErrno(env, errno, "bpf(BPF_PROG_ATTACH)", subject() + " to " + map.subject());
	}
	return env.Undefined();
}

Napi::Value Program::DetachMap(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Map& map = Map::From(info, 0, "map");
	if (bpf_prog_detach2(fd(env), map.fd(env), AttachType(info, 1))) {
		ThrowErrno(env, errno, "bpf(BPF_PROG_DETACH)", subject() + " from " + map.subject());
	}
	return env.Undefined();
}

Napi::Value Program::TestRun(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	int program = fd(env);
	if (!info[0].IsObject()) {
		throw Napi::TypeError::New(env, "Expected `input` to be an object");
	}
	Napi::Object input = info[0].As<Napi::Object>();
	/* All properties before any bytes: a getter is JS, and may move an earlier buffer away. */
	Napi::Value context_given = input.Get("context"), data_given = input.Get("data"), repeat = input.Get("repeat");
	auto optional = [&](Napi::Value value, const char* name) { return value.IsUndefined() ? Bytes{nullptr, 0} : BytesOf(env, value, name); };
	Bytes context = optional(context_given, "context"), data = optional(data_given, "data");
	std::vector<uint8_t> context_out(context.size), data_out(data.size + 256);
	LIBBPF_OPTS(bpf_test_run_opts, opts);
	opts.ctx_in = context.data;
	opts.ctx_size_in = static_cast<uint32_t>(context.size);
	opts.ctx_out = context.size ? context_out.data() : nullptr;
	opts.ctx_size_out = static_cast<uint32_t>(context_out.size());
	opts.data_in = data.data;
	opts.data_size_in = static_cast<uint32_t>(data.size);
	opts.data_out = data.size ? data_out.data() : nullptr;
	opts.data_size_out = data.size ? static_cast<uint32_t>(data_out.size()) : 0;
	opts.repeat = repeat.IsUndefined() ? 0 : static_cast<int>(IntegerOf(env, repeat, "repeat", 1, INT32_MAX));
	if (bpf_prog_test_run_opts(program, &opts)) {
		ThrowErrno(env, errno, "bpf(BPF_PROG_TEST_RUN)", subject());
	}
	Napi::Object result = Napi::Object::New(env);
	result.Set("returnValue", opts.retval);
	result.Set("context", CopyBytes(env, context_out.data(), opts.ctx_size_out));
	result.Set("data", CopyBytes(env, data_out.data(), opts.data_size_out));
	result.Set("durationNs", opts.duration);
	return result;
}

Napi::Value Program::Close(const Napi::CallbackInfo& info) {
	CloseOnce();
	return info.Env().Undefined();
}
