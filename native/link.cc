#include <bpf/bpf.h>

#include <cerrno>

#include "arguments.h"
#include "classes.h"

Napi::Function Link::Define(Napi::Env env) {
	return DefineClass(env, "BpfLink", {
		InstanceMethod<&Link::Info>("info"),
		InstanceMethod<&Link::Update>("update"),
		InstanceMethod<&Link::Pin>("pin"),
		InstanceMethod<&Link::Detach>("detach"),
		InstanceMethod<&Link::Close>("close"),
		InstanceAccessor<&Link::Fd>("fd"),
	});
}

Napi::Object Link::Wrap(Napi::Env env, int fd, const std::string& subject) {
	return Adopt(env, &Instance::link, {fd, -1, subject});
}

Link::Link(const Napi::CallbackInfo& info) : ObjectWrap(info), FdHandle(info.Env()) {}

Napi::Value Link::Fd(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), fd(info.Env())); }

Napi::Value Link::Info(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	/* Larger than this header's struct: a newer kernel may write fields that it does not know. All of it zero, or the kernel says E2BIG. */
	union {
		uint8_t room[256];
		bpf_link_info now;
	} u{};
	uint32_t size = sizeof(u);
	if (bpf_obj_get_info_by_fd(fd(env), &u.now, &size)) {
		ThrowErrno(env, errno, "bpf(BPF_OBJ_GET_INFO_BY_FD)", subject());
	}
	uint64_t target = 0;
	uint32_t attach_type = 0;
	/* BPF_LINK_TYPE_SOCKMAP (6.10) is not in this header: {map_id, attach_type}, laid out as {netns_ino, attach_type}. */
	constexpr uint32_t kSockmap = 14;
	if (u.now.type == BPF_LINK_TYPE_CGROUP) {
		target = u.now.cgroup.cgroup_id;
		attach_type = u.now.cgroup.attach_type;
	} else if (u.now.type == BPF_LINK_TYPE_NETNS || u.now.type == kSockmap) {
		target = u.now.netns.netns_ino;
		attach_type = u.now.netns.attach_type;
	}
	Napi::Object result = Napi::Object::New(env);
	result.Set("id", u.now.id);
	result.Set("type", u.now.type);
	result.Set("programId", u.now.prog_id);
	result.Set("attachType", attach_type);
	result.Set("targetId", Napi::BigInt::New(env, target));
	return result;
}

Napi::Value Link::Update(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Program& program = Program::From(info, 0, "program");
	if (bpf_link_update(fd(env), program.fd(env), nullptr)) {
		ThrowErrno(env, errno, "bpf(BPF_LINK_UPDATE)", subject());
	}
	return env.Undefined();
}

Napi::Value Link::Pin(const Napi::CallbackInfo& info) {
	std::string path = TextArgument(info, 0, "path");
	if (bpf_obj_pin(fd(info.Env()), path.c_str())) {
		ThrowErrno(info.Env(), errno, "bpf(BPF_OBJ_PIN)", path);
	}
	return info.Env().Undefined();
}

Napi::Value Link::Detach(const Napi::CallbackInfo& info) {
	if (bpf_link_detach(fd(info.Env()))) {
		ThrowErrno(info.Env(), errno, "bpf(BPF_LINK_DETACH)", subject());
	}
	return info.Env().Undefined();
}

Napi::Value Link::Close(const Napi::CallbackInfo& info) {
	CloseOnce();
	return info.Env().Undefined();
}
