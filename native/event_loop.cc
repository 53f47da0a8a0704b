#include "event_loop.h"

#include <exception>
#include <utility>

/* libuv frees a handle in a later turn of the loop only: this outlives its Poller until then. */
struct Poller::Watcher {
	uv_poll_t poll;
	/* Null once it is stopped. */
	Handle* handle;
	std::function<void()> on_readable;
	napi_async_cleanup_hook_handle hook;

	uv_handle_t* uv() { return reinterpret_cast<uv_handle_t*>(&poll); }
	int Listen() {
		return uv_poll_start(&poll, UV_READABLE, [](uv_poll_t* poll, int, int) {
			auto* watcher = static_cast<Watcher*>(poll->data);
			try {
				if (watcher->handle) {
					watcher->on_readable();
				}
			} catch (const std::exception&) {
				/* Only while a worker is being terminated: no JS value can be made any more. It may not pass through libuv's C frames. */
			}
		});
	}
};

void Poller::Start(Napi::Env env, int fd, const std::string& subject, Handle& handle, std::function<void()> on_readable) {
	uv_loop_s* loop = nullptr;
	napi_get_uv_event_loop(env, &loop);
	auto* watcher = new Watcher{{}, &handle, std::move(on_readable), nullptr};
	int error = uv_poll_init(loop, &watcher->poll, fd);
	if (error) {
		delete watcher;
		ThrowErrno(env, -error, "uv_poll_init", subject);
	}
	watcher->poll.data = watcher;
	watcher_ = watcher;
	/* The end of the environment waits until the handle is closed, in a worker too. */
	napi_add_async_cleanup_hook(env, [](napi_async_cleanup_hook_handle, void* data) {
		if (Handle* handle = static_cast<Watcher*>(data)->handle) {
			handle->CloseOnce();
		}
	}, watcher, &watcher->hook);
	error = watcher->Listen();
	if (error) {
		ThrowErrno(env, -error, "uv_poll_start", subject);
	}
}

void Poller::Stop() {
	if (Watcher* watcher = std::exchange(watcher_, nullptr)) {
		watcher->handle = nullptr;
		uv_poll_stop(&watcher->poll);
		uv_close(watcher->uv(), [](uv_handle_t* handle) {
			auto* watcher = static_cast<Watcher*>(handle->data);
			napi_remove_async_cleanup_hook(watcher->hook);
			delete watcher;
		});
	}
}

void Poller::Pause() { uv_poll_stop(&watcher_->poll); }

void Poller::Resume() { watcher_->Listen(); }

void Poller::Ref() { uv_ref(watcher_->uv()); }

void Poller::Unref() { uv_unref(watcher_->uv()); }

bool CallBack(Napi::Env env, const Napi::FunctionReference& function, const std::vector<napi_value>& arguments) {
	napi_value result;
	napi_status status = napi_make_callback(env, nullptr, env.Global(), function.Value(), arguments.size(), arguments.data(), &result);
	if (status == napi_ok) {
		return true;
	}
	napi_value error;
	if (status == napi_pending_exception && napi_get_and_clear_last_exception(env, &error) == napi_ok) {
		/* 'uncaughtException'. */
		napi_fatal_exception(env, error);
		return true;
	}
	return false;
}
