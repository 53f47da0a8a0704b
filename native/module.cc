// The addon's entry, and the order in which an environment ends: the hook closes every handle, newest first, while libuv still turns; only
// then come the finalisers of JS objects, which find their handles closed.
#include <unistd.h>

#include "classes.h"

void Registry::CloseAll() {
	ending = true;
	while (!open.empty()) {
		open.back()->CloseOnce();
	}
}

void FdHandle::Release() { close(fd_); }

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
	DefineSystem(env, exports);
	return exports;
}

NODE_API_MODULE(sidestep, Init)
