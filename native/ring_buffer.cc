#include <bpf/libbpf.h>
#include <uv.h>

#include <cerrno>
#include <stdexcept>

#include "arguments.h"
#include "classes.h"

class RingBuffer;

/* libuv frees a handle in a later turn of the loop only: this outlives the JS object until then. */
struct Watcher {
	uv_poll_t poll;
	/* Null once the ring is closed. */
	RingBuffer* ring;
	napi_async_cleanup_hook_handle hook;
};

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
		if (watcher_) {
			watcher_->ring = nullptr;
			uv_poll_stop(&watcher_->poll);
			uv_close(reinterpret_cast<uv_handle_t*>(&watcher_->poll), [](uv_handle_t* handle) {
				auto* watcher = static_cast<Watcher*>(handle->data);
				napi_remove_async_cleanup_hook(watcher->hook);
				delete watcher;
			});
			watcher_ = nullptr;
		}
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
		uv_loop_s* loop = nullptr;
		napi_get_uv_event_loop(env, &loop);
		auto* watcher = new Watcher{};
		int error = uv_poll_init(loop, &watcher->poll, ring_buffer__epoll_fd(ring_));
		if (error) {
			delete watcher;
			ThrowErrno(env, -error, "uv_poll_init", map.subject());
		}
		watcher->poll.data = watcher;
		watcher->ring = this;
		watcher_ = watcher;
		/* The end of the environment waits until the handle is closed, in a worker too. */
		napi_add_async_cleanup_hook(env, [](napi_async_cleanup_hook_handle, void* data) {
			if (RingBuffer* ring = static_cast<Watcher*>(data)->ring) {
				ring->CloseOnce();
			}
		}, watcher, &watcher->hook);
		/* Level-triggered, as is libbpf's epoll on the ring: what a bounded wake-up leaves behind wakes the next turn of the loop. */
		error = uv_poll_start(&watcher->poll, UV_READABLE, [](uv_poll_t* poll, int, int) {
			if (RingBuffer* ring = static_cast<Watcher*>(poll->data)->ring) {
				ring->Consume();
			}
		});
		if (error) {
			ThrowErrno(env, -error, "uv_poll_start", map.subject());
		}
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
			self->Deliver(data, size);
		} catch (const std::exception&) {
			/* Only while a worker is being terminated: no JS value can be made any more. */
			return -1;
		}
		return self->closed() || self->in_this_wakeup_ >= self->most_ ? -1 : 0;
	}

	void Deliver(const void* data, size_t size) {
		Napi::HandleScope scope(env_);
		received_++;
		in_this_wakeup_++;
		/* A copy, as the kernel takes the sample's room back when this returns. */
		napi_value sample = CopyBytes(env_, data, size), result;
		napi_status status = napi_make_callback(env_, nullptr, env_.Global(), on_sample_.Value(), 1, &sample, &result);
		if (status == napi_ok) {
			return;
		}
		napi_value error;
		if (status == napi_pending_exception && napi_get_and_clear_last_exception(env_, &error) == napi_ok) {
			/* 'uncaughtException'. When the environment survives it, the ring goes on. */
			napi_fatal_exception(env_, error);
			return;
		}
		throw std::runtime_error("JS cannot run");
	}

	Napi::Value Received(const Napi::CallbackInfo& info) { return Napi::BigInt::New(info.Env(), received_); }

	Napi::Value Ref(const Napi::CallbackInfo& info) {
		RequireOpen(info.Env(), "ring buffer");
		uv_ref(reinterpret_cast<uv_handle_t*>(&watcher_->poll));
		return info.Env().Undefined();
	}

	Napi::Value Unref(const Napi::CallbackInfo& info) {
		RequireOpen(info.Env(), "ring buffer");
		uv_unref(reinterpret_cast<uv_handle_t*>(&watcher_->poll));
		return info.Env().Undefined();
	}

	Napi::Value Close(const Napi::CallbackInfo& info) {
		CloseOnce();
		return info.Env().Undefined();
	}

	Napi::Env env_;
	ring_buffer* ring_ = nullptr;
	Watcher* watcher_ = nullptr;
	Napi::FunctionReference on_sample_;
	uint64_t received_ = 0;
	uint32_t most_ = 8192, in_this_wakeup_ = 0;
	bool consuming_ = false;
};

Napi::Function DefineRingBuffer(Napi::Env env) { return RingBuffer::Define(env); }

Napi::Value OpenRingBuffer(const Napi::CallbackInfo& info) {
	return Instance::Of(info.Env()).ring_buffer.New({info[0], info[1], info[2]});
}
