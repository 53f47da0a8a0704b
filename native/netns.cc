#include <fcntl.h>
#include <linux/magic.h>
#include <linux/nsfs.h>
#include <linux/sockios.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <new>

#include "arguments.h"
#include "classes.h"
#include "netlink.h"

/* asm-generic/socket.h, 5.14. */
static constexpr int kSoNetnsCookie = 71;

namespace {

struct Visit {
	const std::function<Outcome()>& act;
	Outcome outcome;

	static void* Make(void* visit) {
		auto& [act, outcome] = *static_cast<Visit*>(visit);
		try {
			outcome = act();
		} catch (const std::bad_alloc&) {
			outcome = {-1, ENOMEM, "malloc"};
		}
		return nullptr;
	}
};

/* For threads that this one waits for. */
class OnThisCpu {
 public:
	OnThisCpu() {
		pthread_attr_init(&attributes_);
		int cpu = sched_getcpu();
		if (cpu >= 0 && cpu < CPU_SETSIZE) {
			cpu_set_t only;
			CPU_ZERO(&only);
			CPU_SET(cpu, &only);
			pthread_attr_setaffinity_np(&attributes_, sizeof(only), &only);
		}
	}
	~OnThisCpu() { pthread_attr_destroy(&attributes_); }
	OnThisCpu(const OnThisCpu&) = delete;
	OnThisCpu& operator=(const OnThisCpu&) = delete;
	const pthread_attr_t* get() const { return &attributes_; }

 private:
	pthread_attr_t attributes_;
};

/* A process of a real-time class may have taken this CPU: then the thread goes on wherever we may run. */
void JoinOnAnyCpuIfLate(pthread_t thread) {
	static constexpr long kLateNs = 10000000;
	timespec late;
	clock_gettime(CLOCK_REALTIME, &late);
	late.tv_nsec += kLateNs;
	if (late.tv_nsec >= 1000000000) {
		late.tv_sec++;
		late.tv_nsec -= 1000000000;
	}
	if (pthread_timedjoin_np(thread, nullptr, &late) == 0) {
		return;
	}
	cpu_set_t ours;
	if (pthread_getaffinity_np(pthread_self(), sizeof(ours), &ours) == 0) {
		pthread_setaffinity_np(thread, sizeof(ours), &ours);
	}
	pthread_join(thread, nullptr);
}

}  // namespace

/*
 * Runs `act` on a thread that lives for just that: setns and unshare change the calling thread, and a JS or libuv pool thread would take
 * the namespace into later file and socket calls. The kernel likes to put a new thread onto another CPU, where it waits for whoever is busy there,
 * often for a whole tick (4 ms); this one is idle from now on.
 */
static int OnThreadOfItsOwn(Napi::Env env, const std::string& subject, const std::function<Outcome()>& act) {
	Visit visit{act, {}};
	pthread_t thread;
	int error = pthread_create(&thread, OnThisCpu().get(), Visit::Make, &visit);
	if (error) {
		/* This CPU was taken from us in between, or somebody does not let us choose. */
		error = pthread_create(&thread, nullptr, Visit::Make, &visit);
	}
	if (error) {
		ThrowErrno(env, error, "pthread_create", subject);
	}
	JoinOnAnyCpuIfLate(thread);
	if (visit.outcome.error) {
		ThrowErrno(env, visit.outcome.error, visit.outcome.syscall, subject);
	}
	return visit.outcome.fd;
}

Napi::Function NetNs::Define(Napi::Env env) {
	return DefineClass(env, "NetNs", {
		InstanceAccessor<&NetNs::Fd>("fd"),
		InstanceAccessor<&NetNs::Device>("device"),
		InstanceAccessor<&NetNs::Inode>("inode"),
		InstanceMethod<&NetNs::Cookie>("cookie"),
		InstanceMethod<&NetNs::Socket>("socket"),
		InstanceMethod<&NetNs::Interfaces>("interfaces"),
		InstanceMethod<&NetNs::Addresses>("addresses"),
		InstanceMethod<&NetNs::Routes>("routes"),
		InstanceMethod<&NetNs::LocalRoutes>("localRoutes"),
		InstanceMethod<&NetNs::Rules>("rules"),
		InstanceMethod<&NetNs::SetUp>("setUp"),
		InstanceMethod<&NetNs::ChangeRule>("changeRule"),
		InstanceMethod<&NetNs::ChangeLocalRoute>("changeLocalRoute"),
		InstanceMethod<&NetNs::ChangeAddress>("changeAddress"),
		InstanceMethod<&NetNs::Sysctls>("sysctls"),
		InstanceMethod<&NetNs::SetSysctl>("setSysctl"),
		InstanceMethod<&NetNs::RunIterator>("runIterator"),
		InstanceMethod<&NetNs::TestRun>("testRun"),
		InstanceMethod<&NetNs::DestroyTcpSocket>("destroyTcpSocket"),
		InstanceMethod<&NetNs::Close>("close"),
	});
}

Napi::Object NetNs::Wrap(Napi::Env env, int fd, const std::string& subject) {
	return Adopt(env, &Instance::netns, {fd, -1, subject});
}

NetNs::NetNs(const Napi::CallbackInfo& info) : ObjectWrap(info), FdHandle(info.Env()) {
	Napi::Env env = info.Env();
	struct stat status;
	struct statfs filesystem;
	int own = fd(env);
	Checked(env, "fstat", subject(), [&] { return fstat(own, &status); });
	Checked(env, "fstatfs", subject(), [&] { return fstatfs(own, &filesystem); });
	/* The file system first: to another driver the same ioctl number may mean anything. */
	if (filesystem.f_type != NSFS_MAGIC || ioctl(own, NS_GET_NSTYPE) != CLONE_NEWNET) {
		ThrowErrno(env, EINVAL, "ioctl(NS_GET_NSTYPE)", subject());
	}
	device_ = status.st_dev;
	inode_ = status.st_ino;
}

Napi::Value NetNs::Fd(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), fd(info.Env())); }
Napi::Value NetNs::Device(const Napi::CallbackInfo& info) { return Napi::BigInt::New(info.Env(), device_); }
Napi::Value NetNs::Inode(const Napi::CallbackInfo& info) { return Napi::BigInt::New(info.Env(), inode_); }

int NetNs::Inside(Napi::Env env, const std::string& what, const std::function<Outcome()>& act) const {
	int own = fd(env);
	return OnThreadOfItsOwn(env, what, [&] {
		Outcome entered = Outcome::Of(setns(own, CLONE_NEWNET), "setns");
		return entered.error ? entered : act();
	});
}

int NetNs::SocketInside(Napi::Env env, int family, int type, int protocol) const {
	return Inside(env, subject(), [&] { return Outcome::Of(socket(family, type | SOCK_CLOEXEC, protocol), "socket"); });
}

Netlink& NetNs::Route(Napi::Env env) {
	RequireOpen(env, subject().c_str());
	if (!route_ || route_->failed()) {
		route_ = std::make_unique<Netlink>(SocketInside(env, AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
	}
	return *route_;
}

void NetNs::Release() {
	route_.reset();
	FdHandle::Release();
}

/* Here, as a Netlink is whole here only. */
NetNs::~NetNs() { CloseOnce(); }

Napi::Value NetNs::Socket(const Napi::CallbackInfo& info) {
	int family = static_cast<int>(IntegerArgument(info, 0, "family"));
	int type = static_cast<int>(IntegerArgument(info, 1, "type"));
	int protocol = static_cast<int>(IntegerArgument(info, 2, "protocol"));
	return Napi::Number::New(info.Env(), SocketInside(info.Env(), family, type, protocol));
}

Napi::Value NetNs::Cookie(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	int socket = Route(env).fd();
	uint64_t cookie = 0;
	socklen_t size = sizeof(cookie);
	Checked(env, "getsockopt(SO_NETNS_COOKIE)", subject(), [&] { return getsockopt(socket, SOL_SOCKET, kSoNetnsCookie, &cookie, &size); });
	return Napi::BigInt::New(env, cookie);
}

Napi::Value NetNs::Close(const Napi::CallbackInfo& info) {
	CloseOnce();
	return info.Env().Undefined();
}

Napi::Value OpenNetns(const Napi::CallbackInfo& info) {
	std::string path = TextArgument(info, 0, "path");
	/* O_NONBLOCK: a fifo at that path must not hold the agent up. */
	int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) {
		ThrowErrno(info.Env(), errno, "open", path);
	}
	return NetNs::Wrap(info.Env(), fd, path);
}

Napi::Value NetnsOfSocket(const Napi::CallbackInfo& info) {
	int socket = FdArgument(info, 0, "fd");
	int fd = ioctl(socket, SIOCGSKNS);
	if (fd < 0) {
		ThrowErrno(info.Env(), errno, "ioctl(SIOCGSKNS)", "fd " + std::to_string(socket));
	}
	return NetNs::Wrap(info.Env(), fd, "namespace of fd " + std::to_string(socket));
}

Napi::Value CreateNetns(const Napi::CallbackInfo& info) {
	std::string subject = "new network namespace";
	int fd = OnThreadOfItsOwn(info.Env(), subject, [] {
		Outcome entered = Outcome::Of(unshare(CLONE_NEWNET), "unshare");
		/* thread-self: /proc/self is the main thread, which stays where it was. */
		return entered.error ? entered : Outcome::Of(open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC), "open");
	});
	return NetNs::Wrap(info.Env(), fd, subject);
}
