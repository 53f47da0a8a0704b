#include <bpf/libbpf.h>

#include <cerrno>
#include <exception>

#include "arguments.h"
#include "classes.h"
#include "event_loop.h"

class RingBuffer : public Napi::ObjectWrap<RingBuffer>, public Handle {
 public:
	static Napi::Function Define(Napi::Env env) {
		return DefineClass(env, "RingBuffer", {
			InstanceAccessor<&RingBuffer::Received>("received"),
			InstanceMethod<&RingBuffer::Ref>("ref"),
			InstanceMethod<&RingBuffer::Unref>("unref"),
			InstanceMethod<&RingBuffer::Close>("close"),
		});
	}

	explicit RingBuffer(const Napi::CallbackInfo& info) : ObjectWrap(info), Handle(info.Env()), env_(info.Env()) {
		try {
			Open(info);
		} catch (...) {
			CloseOnce();
			throw;
		}
	}
	~RingBuffer() override { CloseOnce(); }

 protected:
	void Release() override {
		poller_.Stop();
		if (!consuming_) {
			Free();
		}
	}

 private:
	void Open(const Napi::CallbackInfo& info) {
		Napi::Env env = info.Env();
		Map& map = Map::From(info, 0, "map");
		if (!info[1].IsFunction()) {
			throw Napi::TypeError::New(env, "Expected `onSample` to be a function");
		}
		on_sample_ = Napi::Persistent(info[1].As<Napi::Function>());
		if (info[2].IsObject()) {
			Napi::Value most = info[2].As<Napi::Object>().Get("maxPerWakeup");
			if (!most.IsUndefined()) {
				most_ = static_cast<uint32_t>(IntegerOf(env, most, "maxPerWakeup", 1, INT32_MAX));
			}
		}
		LibbpfLog log;
		ring_ = ring_buffer__new(map.fd(env), OnSample, this, nullptr);
		if (!ring_) {
			ThrowErrno(env, errno, "ring_buffer__new", map.subject(), log.text());
		}
		/* libbpf's epoll on the ring is level-triggered too: what a bounded wake-up leaves behind wakes the next turn of the loop. */
		poller_.Start(env, ring_buffer__epoll_fd(ring_), map.subject(), *this, [this] { Consume(); });
	}

	void Consume() {
		if (registry_->ending) {
			return;
		}
		Napi::HandleScope scope(env_);
		/* The callback may drop the last reference to this object and close it. */
		Napi::Reference<Napi::Object> self = Napi::Persistent(Value());
		in_this_wakeup_ = 0;
		consuming_ = true;
		ring_buffer__consume(ring_);
		consuming_ = false;
		if (closed()) {
			Free();
		}
	}

	void Free() {
		ring_buffer__free(ring_);
		ring_ = nullptr;
		on_sample_.Reset();
	}

	/* A negative result stops libbpf after this sample, which counts as read. No C++ exception may pass through libbpf's C frames. */
	static int OnSample(void* context, void* data, size_t size) {
		auto* self = static_cast<RingBuffer*>(context);
		try {
			return self->Deliver(data, size) && !self->closed() && self->in_this_wakeup_ < self->most_ ? 0 : -1;
		} catch (const std::exception&) {
			/* Only while a worker is being terminated: no JS value can be made any more. */
			return -1;
		}
	}

	bool Deliver(const void* data, size_t size) {
		Napi::HandleScope scope(env_);
		received_++;
		in_this_wakeup_++;
		/* A copy, as the kernel takes the sample's room back when this returns. */
		return CallBack(env_, on_sample_, {CopyBytes(env_, data, size)});
	}

	Napi::Value Received(const Napi::CallbackInfo& info) { return Napi::BigInt::New(info.Env(), received_); }

	Napi::Value Ref(const Napi::CallbackInfo& info) {
		RequireOpen(info.Env(), "ring buffer");
		poller_.Ref();
		return info.Env().Undefined();
	}

	Napi::Value Unref(const Napi::CallbackInfo& info) {
		RequireOpen(info.Env(), "ring buffer");
		poller_.Unref();
		return info.Env().Undefined();
	}

	Napi::Value Close(const Napi::CallbackInfo& info) {
		CloseOnce();
		return info.Env().Undefined();
	}

	Napi::Env env_;
	ring_buffer* ring_ = nullptr;
	Poller poller_;
	Napi::FunctionReference on_sample_;
	uint64_t received_ = 0;
	uint32_t most_ = 8192, in_this_wakeup_ = 0;
	bool consuming_ = false;
};

Napi::Function DefineRingBuffer(Napi::Env env) { return RingBuffer::Define(env); }

Napi::Value OpenRingBuffer(const Napi::CallbackInfo& info) {
	return Instance::Of(info.Env()).ring_buffer.New({info[0], info[1], info[2]});
}
