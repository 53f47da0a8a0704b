// How an fd and a JS callback meet on the event loop.
#pragma once

#include <napi.h>
#include <uv.h>

#include <functional>
#include <string>
#include <vector>

#include "handle.h"

/* Tells when an fd is readable: level-triggered, so that what is left behind wakes the next turn of the loop. */
class Poller {
 public:
	~Poller() { Stop(); }

	/* `handle` is closed when the environment ends. `on_readable` is not called after Stop(), and may lead to it. */
	void Start(Napi::Env env, int fd, const std::string& subject, Handle& handle, std::function<void()> on_readable);
	/* The fd may be closed right after. */
	void Stop();
	/* These only between Start() and Stop(). */
	void Pause();
	void Resume();
	void Ref();
	void Unref();

 private:
	struct Watcher;
	Watcher* watcher_ = nullptr;
};

/*
 * Calls JS from the event loop. What it throws is uncaught in the usual way, and no reason to stop.
 * @returns false when JS cannot run any more, as a worker is being terminated.
 */
bool CallBack(Napi::Env env, const Napi::FunctionReference& function, const std::vector<napi_value>& arguments);
