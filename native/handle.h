// What every object with a kernel resource behind it shares: idempotent close, and an end with the environment.
#pragma once

#include <napi.h>
#include <unistd.h>

#include <list>
#include <memory>
#include <string>

#include "errno_error.h"

class Handle;

/* The open handles of one environment (main thread or worker), oldest first. */
class Registry {
 public:
	std::list<Handle*> open;
	/* Set when the environment ends: JS may not be called any more. */
	bool ending = false;
	/* Newest first: a link goes before its program, a ring buffer before its map. */
	void CloseAll();
};

/* An fd that is closed with the scope. */
struct OwnedFd {
	const int fd;

	explicit OwnedFd(int fd) : fd(fd) {}
	~OwnedFd() { close(fd); }
	OwnedFd(const OwnedFd&) = delete;
	OwnedFd& operator=(const OwnedFd&) = delete;
};

/* An fd on its way into the JS object that will own it. */
struct Adoption {
	int fd = -1;
	/* Programs: the type the object was compiled with, or -1 where only an fd is known. */
	int attach_type = -1;
	std::string subject;
};

/* Per environment, never static: several workers load the addon at once. */
struct Instance {
	std::shared_ptr<Registry> registry = std::make_shared<Registry>();
	Napi::FunctionReference object, map, program, link, ring_buffer, netns, seqpacket_listener, seqpacket_connection;
	Adoption adoption;

	static Instance& Of(Napi::Env env) { return *env.GetInstanceData<Instance>(); }
};

/*
 * close() reaches Release() once, from whichever comes first: JS, the garbage collector, or the end of the environment. The registry
 * is shared, as finalisers may run after the instance data is gone.
 */
class Handle {
 public:
	explicit Handle(Napi::Env env) : registry_(Instance::Of(env).registry) {
		position_ = registry_->open.insert(registry_->open.end(), this);
	}
	virtual ~Handle() = default;
	Handle(const Handle&) = delete;
	Handle& operator=(const Handle&) = delete;

	void CloseOnce() {
		if (!closed_) {
			closed_ = true;
			registry_->open.erase(position_);
			Release();
		}
	}

 protected:
	virtual void Release() = 0;
	bool closed() const { return closed_; }
	void RequireOpen(Napi::Env env, const char* kind) const {
		if (closed_) {
			ThrowErrno(env, EBADF, "close", std::string(kind) + " is closed already");
		}
	}
	std::shared_ptr<Registry> registry_;

 private:
	std::list<Handle*>::iterator position_;
	bool closed_ = false;
};

/* A handle that is one file descriptor. Made by Adopt() only: called from JS, its constructor finds nothing to adopt and throws. */
class FdHandle : public Handle {
 public:
	/* The fd is owned from here on; when the derived constructor throws, ~FdHandle closes it. */
	explicit FdHandle(Napi::Env env) : FdHandle(env, Take(env)) {}
	~FdHandle() override { CloseOnce(); }

	/* Takes the fd over, whatever happens: making an object fails while a worker is being terminated. */
	static Napi::Object Adopt(Napi::Env env, Napi::FunctionReference Instance::*kind, Adoption adoption);

	/* Throws EBADF when closed. */
	int fd(Napi::Env env) const {
		RequireOpen(env, subject_.c_str());
		return fd_;
	}
	const std::string& subject() const { return subject_; }
	int attach_type() const { return attach_type_; }

 protected:
	void Release() override;

 private:
	FdHandle(Napi::Env env, Adoption adoption)
		: Handle(env), fd_(adoption.fd), attach_type_(adoption.attach_type), subject_(std::move(adoption.subject)) {}
	static Adoption Take(Napi::Env env);
	int fd_;
	int attach_type_;
	std::string subject_;
};
