// AF_UNIX SOCK_SEQPACKET: a listener and its connections, which keep packets' bounds and can hand over an fd.
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "arguments.h"
#include "classes.h"
#include "event_loop.h"

static constexpr int kBacklog = 64;
/* What one wake-up takes, so that other work gets its turn. */
static constexpr int kMostPackets = 64, kMostConnections = 16;
static constexpr size_t kMostBytes = 4096;

static Napi::FunctionReference FunctionOf(const Napi::Object& events, const char* name) {
	Napi::Value function = events.Get(name);
	if (!function.IsFunction()) {
		throw Napi::TypeError::New(events.Env(), std::string("Expected `") + name + "` to be a function");
	}
	return Napi::Persistent(function.As<Napi::Function>());
}

static Napi::Value ErrorOf(Napi::Env env, int error, const char* syscall, const std::string& subject) {
	try {
		ThrowErrno(env, error, syscall, subject);
	} catch (const Napi::Error& js) {
		return js.Value();
	}
}

class SeqpacketConnection : public Napi::ObjectWrap<SeqpacketConnection>, public FdHandle {
 public:
	static Napi::Function Define(Napi::Env env) {
		return DefineClass(env, "SeqpacketConnection", {
			InstanceAccessor<&SeqpacketConnection::Peer>("peer"),
			InstanceMethod<&SeqpacketConnection::Read>("read"),
			InstanceMethod<&SeqpacketConnection::Send>("send"),
			InstanceMethod<&SeqpacketConnection::Close>("close"),
		});
	}

	explicit SeqpacketConnection(const Napi::CallbackInfo& info) : ObjectWrap(info), FdHandle(info.Env()), env_(info.Env()) {}
	~SeqpacketConnection() override { CloseOnce(); }

 protected:
	void Release() override {
		poller_.Stop();
		on_packet_.Reset();
		on_end_.Reset();
		FdHandle::Release();
	}

 private:
	Napi::Value Peer(const Napi::CallbackInfo& info) {
		int own = fd(info.Env());
		ucred peer{};
		socklen_t size = sizeof(peer);
		Checked(info.Env(), "getsockopt(SO_PEERCRED)", subject(), [&] { return getsockopt(own, SOL_SOCKET, SO_PEERCRED, &peer, &size); });
		Napi::Object result = Napi::Object::New(info.Env());
		result.Set("pid", peer.pid);
		result.Set("uid", peer.uid);
		result.Set("gid", peer.gid);
		return result;
	}

	Napi::Value Read(const Napi::CallbackInfo& info) {
		Napi::Env env = info.Env();
		int own = fd(env);
		Napi::Object events = ObjectArgument(info, 0, "events");
		if (!on_packet_.IsEmpty()) {
			ThrowErrno(env, EALREADY, "read", subject());
		}
		Napi::FunctionReference on_packet = FunctionOf(events, "onPacket"), on_end = FunctionOf(events, "onEnd");
		poller_.Start(env, own, subject(), *this, [this] { ReadAll(); });
		on_packet_ = std::move(on_packet);
		on_end_ = std::move(on_end);
		return env.Undefined();
	}

	void ReadAll() {
		if (registry_->ending) {
			return;
		}
		Napi::HandleScope scope(env_);
		/* The callbacks may drop the last reference to this object and close it. */
		Napi::ObjectReference self = Napi::Persistent(Value());
		for (int i = 0; i < kMostPackets && !closed(); i++) {
			uint8_t bytes[kMostBytes];
			iovec part{bytes, sizeof(bytes)};
			/* There is no room for control messages: fds that a peer sends never come into this process. */
			msghdr message{};
			message.msg_iov = &part;
			message.msg_iovlen = 1;
			ssize_t got = recvmsg(fd(env_), &message, MSG_DONTWAIT);
			if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
				return;
			}
			if (got <= 0) {
				return End(got < 0 ? errno : 0);
			}
			Napi::HandleScope packet(env_);
			if (!CallBack(env_, on_packet_, {CopyBytes(env_, bytes, static_cast<size_t>(got)), Napi::Boolean::New(env_, message.msg_flags & MSG_TRUNC)})) {
				return;
			}
		}
	}

	void End(int error) {
		Napi::FunctionReference on_end = std::move(on_end_);
		CloseOnce();
		CallBack(env_, on_end, {error ? ErrorOf(env_, error, "recvmsg", subject()) : env_.Undefined()});
	}

	Napi::Value Send(const Napi::CallbackInfo& info) {
		Napi::Env env = info.Env();
		int own = fd(env);
		Bytes bytes = BytesArgument(info, 0, "bytes");
		iovec part{bytes.data, bytes.size};
		alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
		msghdr message{};
		message.msg_iov = &part;
		message.msg_iovlen = 1;
		if (!info[1].IsUndefined()) {
			int passed = FdArgument(info, 1, "fd");
			message.msg_control = control;
			message.msg_controllen = sizeof(control);
			cmsghdr* header = CMSG_FIRSTHDR(&message);
			header->cmsg_level = SOL_SOCKET;
			header->cmsg_type = SCM_RIGHTS;
			header->cmsg_len = CMSG_LEN(sizeof(passed));
			memcpy(CMSG_DATA(header), &passed, sizeof(passed));
		}
		Checked(env, "sendmsg", subject(), [&] { return sendmsg(own, &message, MSG_DONTWAIT | MSG_NOSIGNAL); });
		return env.Undefined();
	}

	Napi::Value Close(const Napi::CallbackInfo& info) {
		CloseOnce();
		return info.Env().Undefined();
	}

	Napi::Env env_;
	Poller poller_;
	Napi::FunctionReference on_packet_, on_end_;
};

class SeqpacketListener : public Napi::ObjectWrap<SeqpacketListener>, public FdHandle {
 public:
	static Napi::Function Define(Napi::Env env) {
		return DefineClass(env, "SeqpacketListener", {
			InstanceMethod<&SeqpacketListener::Resume>("resume"),
			InstanceMethod<&SeqpacketListener::Close>("close"),
		});
	}

	explicit SeqpacketListener(const Napi::CallbackInfo& info) : ObjectWrap(info), FdHandle(info.Env()), env_(info.Env()) {}
	~SeqpacketListener() override { CloseOnce(); }

	void Start(const Napi::Object& events) {
		on_connection_ = FunctionOf(events, "onConnection");
		on_error_ = FunctionOf(events, "onError");
		poller_.Start(env_, fd(env_), subject(), *this, [this] { AcceptAll(); });
	}

 protected:
	void Release() override {
		poller_.Stop();
		on_connection_.Reset();
		on_error_.Reset();
		FdHandle::Release();
	}

 private:
	void AcceptAll() {
		if (registry_->ending) {
			return;
		}
		Napi::HandleScope scope(env_);
		Napi::ObjectReference self = Napi::Persistent(Value());
		for (int i = 0; i < kMostConnections && !closed(); i++) {
			int accepted = accept4(fd(env_), nullptr, nullptr, SOCK_CLOEXEC);
			if (accepted >= 0) {
				Napi::HandleScope connection(env_);
				if (!CallBack(env_, on_connection_, {Adopt(env_, &Instance::seqpacket_connection, {accepted, -1, subject()})})) {
					return;
				}
			} else if (errno == EAGAIN) {
				return;
			} else if (errno != EINTR && errno != ECONNABORTED) {
				/* The connection stays in the queue (EMFILE, ENFILE, ENOMEM): listening on would turn without end. */
				Napi::Value error = ErrorOf(env_, errno, "accept4", subject());
				poller_.Pause();
				CallBack(env_, on_error_, {error});
				return;
			}
		}
	}

	Napi::Value Resume(const Napi::CallbackInfo& info) {
		RequireOpen(info.Env(), subject().c_str());
		poller_.Resume();
		return info.Env().Undefined();
	}

	Napi::Value Close(const Napi::CallbackInfo& info) {
		CloseOnce();
		return info.Env().Undefined();
	}

	Napi::Env env_;
	Poller poller_;
	Napi::FunctionReference on_connection_, on_error_;
};

/* Whether the file is a socket that a process has left behind: nobody can be asked any more. */
static bool IsStale(const sockaddr_un& address) {
	struct stat status;
	if (lstat(address.sun_path, &status) || !S_ISSOCK(status.st_mode)) {
		return false;
	}
	OwnedFd probe{socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)};
	return connect(probe.fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) && errno == ECONNREFUSED;
}

static Napi::Value ListenSeqpacket(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	std::string path = TextArgument(info, 0, "path");
	auto mode = static_cast<mode_t>(IntegerArgument(info, 1, "mode", 0, 0777));
	Napi::Object events = ObjectArgument(info, 2, "events");
	sockaddr_un address{};
	address.sun_family = AF_UNIX;
	/* An empty one would be bound to a name of the kernel's choice. */
	if (path.empty() || path.size() >= sizeof(address.sun_path)) {
		ThrowErrno(env, path.empty() ? ENOENT : ENAMETOOLONG, "bind", path);
	}
	memcpy(address.sun_path, path.data(), path.size());

	int own = Checked(env, "socket", path, [] { return socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); });
	Napi::Object listener = FdHandle::Adopt(env, &Instance::seqpacket_listener, {own, -1, path});
	auto* handle = Napi::ObjectWrap<SeqpacketListener>::Unwrap(listener);
	try {
		/* bind() gives the file the mode that the socket has, less the umask: at no moment it has another. */
		Checked(env, "fchmod", path, [&] { return fchmod(own, mode); });
		auto bind_it = [&] { return bind(own, reinterpret_cast<sockaddr*>(&address), sizeof(address)); };
		if (bind_it()) {
			int error = errno;
			if (error != EADDRINUSE || !IsStale(address)) {
				ThrowErrno(env, error, "bind", path);
			}
			Checked(env, "unlink", path, [&] { return unlink(path.c_str()); });
			Checked(env, "bind", path, bind_it);
		}
		Checked(env, "listen", path, [&] { return listen(own, kBacklog); });
		handle->Start(events);
	} catch (...) {
		handle->CloseOnce();
		throw;
	}
	return listener;
}

void DefineSeqpacket(Napi::Env env, Napi::Object exports) {
	Instance& instance = Instance::Of(env);
	instance.seqpacket_listener = Napi::Persistent(SeqpacketListener::Define(env));
	instance.seqpacket_connection = Napi::Persistent(SeqpacketConnection::Define(env));
	exports.Set("listenSeqpacket", Napi::Function::New(env, ListenSeqpacket, "listenSeqpacket"));
}
