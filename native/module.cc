// The addon's entry, and the order in which an environment ends: the hook closes every handle, newest first, while libuv still turns; only
// then come the finalisers of JS objects, which find their handles closed.
#include <unistd.h>

#include <utility>

#include "classes.h"

void Registry::CloseAll() {
	ending = true;
	while (!open.empty()) {
		open.back()->CloseOnce();
	}
}

void FdHandle::Release() { close(fd_); }

Napi::Object FdHandle::Adopt(Napi::Env env, Napi::FunctionReference Instance::*kind, Adoption adoption) {
	Instance& instance = Instance::Of(env);
	instance.adoption = std::move(adoption);
	/*
	 * On every way out, not on an exception only: in a worker that is being terminated the constructor can fail without one, as nothing can
	 * be thrown into JS any more (NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS).
	 */
	struct Unclaimed {
		Adoption& adoption;
		~Unclaimed() {
			if (adoption.fd >= 0) {
				close(adoption.fd);
				adoption = {};
			}
		}
	} unclaimed{instance.adoption};
	return (instance.*kind).New({});
}

Adoption FdHandle::Take(Napi::Env env) {
	Adoption taken = std::exchange(Instance::Of(env).adoption, {});
	if (taken.fd < 0) {
		throw Napi::TypeError::New(env, "Illegal constructor");
	}
	return taken;
}

static Napi::Object Init(Napi::Env env, Napi::Object exports) {
	auto* instance = new Instance;
	env.SetInstanceData(instance);
	env.AddCleanupHook([](Registry* registry) { registry->CloseAll(); }, instance->registry.get());
	/* Silence libbpf from the first call on. */
	LibbpfLog silence;

	instance->object = Napi::Persistent(Object::Define(env));
	instance->map = Napi::Persistent(Map::Define(env));
	instance->program = Napi::Persistent(Program::Define(env));
	instance->link = Napi::Persistent(Link::Define(env));
	instance->netns = Napi::Persistent(NetNs::Define(env));
	instance->ring_buffer = Napi::Persistent(DefineRingBuffer(env));
	DefineSeqpacket(env, exports);
	DefineSystem(env, exports);
	return exports;
}

NODE_API_MODULE(sidestep, Init)
