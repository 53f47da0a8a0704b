#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/nsfs.h>
#include <linux/rtnetlink.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <functional>
#include <map>
#include <system_error>
#include <thread>
#include <vector>

#include "arguments.h"
#include "classes.h"

/* asm-generic/socket.h, 5.14. */
static constexpr int kSoNetnsCookie = 71;

/* An fd, or a positive errno and the call that gave it. */
struct Outcome {
	int fd = -1;
	int error = 0;
	const char* syscall = "";

	static Outcome Of(int result, const char* syscall) { return result < 0 ? Outcome{-1, errno, syscall} : Outcome{result, 0, syscall}; }
};

/*
 * Runs `act` on a thread that lives for just that: setns and unshare change the calling thread, and a JS or libuv pool thread would take
 * the namespace into later file and socket calls.
 */
static int OnThreadOfItsOwn(Napi::Env env, const std::string& subject, const std::function<Outcome()>& act) {
	Outcome outcome;
	try {
		std::thread([&] { outcome = act(); }).join();
	} catch (const std::system_error& error) {
		outcome = {-1, error.code().value(), "pthread_create"};
	}
	if (outcome.error) {
		ThrowErrno(env, outcome.error, outcome.syscall, subject);
	}
	return outcome.fd;
}

Napi::Function NetNs::Define(Napi::Env env) {
	return DefineClass(env, "NetNs", {
		InstanceAccessor<&NetNs::Fd>("fd"),
		InstanceAccessor<&NetNs::Device>("device"),
		InstanceAccessor<&NetNs::Inode>("inode"),
		InstanceMethod<&NetNs::Cookie>("cookie"),
		InstanceMethod<&NetNs::Socket>("socket"),
		InstanceMethod<&NetNs::Addresses>("addresses"),
		InstanceMethod<&NetNs::LocalRoutes>("localRoutes"),
		InstanceMethod<&NetNs::SetUp>("setUp"),
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

int NetNs::SocketInside(Napi::Env env, int family, int type, int protocol) const {
	int own = fd(env);
	return OnThreadOfItsOwn(env, subject(), [&] {
		Outcome entered = Outcome::Of(setns(own, CLONE_NEWNET), "setns");
		return entered.error ? entered : Outcome::Of(socket(family, type | SOCK_CLOEXEC, protocol), "socket");
	});
}

Napi::Value NetNs::Socket(const Napi::CallbackInfo& info) {
	int family = static_cast<int>(IntegerArgument(info, 0, "family"));
	int type = static_cast<int>(IntegerArgument(info, 1, "type"));
	int protocol = static_cast<int>(IntegerArgument(info, 2, "protocol"));
	return Napi::Number::New(info.Env(), SocketInside(info.Env(), family, type, protocol));
}

Napi::Value NetNs::Cookie(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	int probe = SocketInside(env, AF_UNIX, SOCK_DGRAM, 0);
	uint64_t cookie = 0;
	socklen_t size = sizeof(cookie);
	int error = getsockopt(probe, SOL_SOCKET, kSoNetnsCookie, &cookie, &size) ? errno : 0;
	close(probe);
	CheckErrno(env, error ? -1 : 0, error, "getsockopt(SO_NETNS_COOKIE)", subject());
	return Napi::BigInt::New(env, cookie);
}

namespace {

/* A netlink socket that is closed with the scope. */
class Netlink {
 public:
	explicit Netlink(int fd) : fd_(fd) {}
	~Netlink() { close(fd_); }

	/* Sends one request. Gives 0 or a positive errno; `each` sees every message of the answer. */
	int Ask(nlmsghdr* request, const std::function<void(nlmsghdr*)>& each) {
		/* A dump that the kernel changed under way says so, and is asked for again. */
		for (int attempt = 0; attempt < 5; attempt++) {
			std::vector<std::vector<char>> answers;
			request->nlmsg_seq = ++sequence_;
			if (send(fd_, request, request->nlmsg_len, 0) < 0) {
				return errno;
			}
			int error = Receive(answers);
			if (error == EAGAIN) {
				continue;
			}
			for (auto& answer : answers) {
				each(reinterpret_cast<nlmsghdr*>(answer.data()));
			}
			return error;
		}
		return EAGAIN;
	}

 private:
	int Receive(std::vector<std::vector<char>>& answers) {
		bool interrupted = false;
		alignas(nlmsghdr) char buffer[65536];
		for (;;) {
			sockaddr_nl sender{};
			socklen_t size = sizeof(sender);
			ssize_t got = recvfrom(fd_, buffer, sizeof(buffer), 0, reinterpret_cast<sockaddr*>(&sender), &size);
			if (got < 0) {
				if (errno == EINTR) {
					continue;
				}
				return errno;
			}
			/* A pod with CAP_NET_ADMIN may write to this socket too: only the kernel has port 0. */
			if (sender.nl_pid != 0) {
				continue;
			}
			int left = static_cast<int>(got);
			for (nlmsghdr* message = reinterpret_cast<nlmsghdr*>(buffer); NLMSG_OK(message, static_cast<unsigned>(left)); message = NLMSG_NEXT(message, left)) {
				interrupted |= (message->nlmsg_flags & NLM_F_DUMP_INTR) != 0;
				if (message->nlmsg_type == NLMSG_DONE) {
					/* A dump that failed half way ends with its errno here. */
					int result = message->nlmsg_len >= NLMSG_LENGTH(sizeof(int)) ? *static_cast<int*>(NLMSG_DATA(message)) : 0;
					return result < 0 ? -result : interrupted ? EAGAIN : 0;
				}
				if (message->nlmsg_type == NLMSG_ERROR) {
					return -static_cast<nlmsgerr*>(NLMSG_DATA(message))->error;
				}
				char* start = reinterpret_cast<char*>(message);
				answers.emplace_back(start, start + message->nlmsg_len);
			}
		}
	}

	int fd_;
	uint32_t sequence_ = 0;
};

template <typename Body>
struct Request {
	nlmsghdr header{};
	Body body{};
	Request(uint16_t type, uint16_t flags) {
		header.nlmsg_len = NLMSG_LENGTH(sizeof(Body));
		header.nlmsg_type = type;
		header.nlmsg_flags = static_cast<uint16_t>(NLM_F_REQUEST | flags);
	}
};

template <typename Body>
std::map<int, rtattr*> Attributes(nlmsghdr* message) {
	std::map<int, rtattr*> found;
	int left = static_cast<int>(message->nlmsg_len - NLMSG_LENGTH(sizeof(Body)));
	auto* attribute = reinterpret_cast<rtattr*>(static_cast<char*>(NLMSG_DATA(message)) + NLMSG_ALIGN(sizeof(Body)));
	for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) {
		found[attribute->rta_type] = attribute;
	}
	return found;
}

}  // namespace

Napi::Value NetNs::Addresses(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Netlink netlink(SocketInside(env, AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));

	std::map<int, std::pair<std::string, unsigned>> interfaces;
	Request<ifinfomsg> links(RTM_GETLINK, NLM_F_DUMP);
	int error = netlink.Ask(&links.header, [&](nlmsghdr* message) {
		auto* link = static_cast<ifinfomsg*>(NLMSG_DATA(message));
		auto attributes = Attributes<ifinfomsg>(message);
		auto name = attributes.find(IFLA_IFNAME);
		interfaces[link->ifi_index] = {name == attributes.end() ? "" : static_cast<char*>(RTA_DATA(name->second)), link->ifi_flags};
	});
	CheckErrno(env, -error, error, "netlink(RTM_GETLINK)", subject());

	Napi::Array result = Napi::Array::New(env);
	Request<ifaddrmsg> addresses(RTM_GETADDR, NLM_F_DUMP);
	error = netlink.Ask(&addresses.header, [&](nlmsghdr* message) {
		auto* entry = static_cast<ifaddrmsg*>(NLMSG_DATA(message));
		auto attributes = Attributes<ifaddrmsg>(message);
		/* On point-to-point links IFA_ADDRESS is the other end's, IFA_LOCAL ours; IPv6 has IFA_LOCAL only there. */
		auto ours = attributes.find(IFA_LOCAL);
		if (ours == attributes.end()) {
			ours = attributes.find(IFA_ADDRESS);
		}
		if (ours == attributes.end() || (entry->ifa_family != AF_INET && entry->ifa_family != AF_INET6)) {
			return;
		}
		auto& [name, flags] = interfaces[static_cast<int>(entry->ifa_index)];
		Napi::Object item = Napi::Object::New(env);
		item.Set("family", entry->ifa_family == AF_INET ? 4 : 6);
		item.Set("address", CopyBytes(env, RTA_DATA(ours->second), RTA_PAYLOAD(ours->second)));
		item.Set("prefixLength", static_cast<uint32_t>(entry->ifa_prefixlen));
		item.Set("scope", static_cast<uint32_t>(entry->ifa_scope));
		item.Set("interfaceIndex", static_cast<uint32_t>(entry->ifa_index));
		item.Set("interfaceName", name);
		item.Set("isLoopback", Napi::Boolean::New(env, (flags & IFF_LOOPBACK) != 0));
		item.Set("isUp", Napi::Boolean::New(env, (flags & IFF_UP) != 0));
		result.Set(result.Length(), item);
	});
	CheckErrno(env, -error, error, "netlink(RTM_GETADDR)", subject());
	return result;
}

Napi::Value NetNs::LocalRoutes(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Netlink netlink(SocketInside(env, AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
	Napi::Array result = Napi::Array::New(env);
	for (int family : {AF_INET, AF_INET6}) {
		Request<rtmsg> routes(RTM_GETROUTE, NLM_F_DUMP);
		routes.body.rtm_family = static_cast<unsigned char>(family);
		int error = netlink.Ask(&routes.header, [&](nlmsghdr* message) {
			auto* route = static_cast<rtmsg*>(NLMSG_DATA(message));
			if (message->nlmsg_type != RTM_NEWROUTE || (route->rtm_flags & RTM_F_CLONED)) {
				return;
			}
			auto attributes = Attributes<rtmsg>(message);
			auto table = attributes.find(RTA_TABLE);
			if ((table == attributes.end() ? route->rtm_table : *static_cast<uint32_t*>(RTA_DATA(table->second))) != RT_TABLE_LOCAL) {
				return;
			}
			uint8_t address[16] = {};
			size_t size = family == AF_INET ? 4 : 16;
			auto destination = attributes.find(RTA_DST);
			if (destination != attributes.end()) {
				memcpy(address, RTA_DATA(destination->second), std::min<size_t>(size, RTA_PAYLOAD(destination->second)));
			}
			Napi::Object item = Napi::Object::New(env);
			item.Set("family", family == AF_INET ? 4 : 6);
			item.Set("address", CopyBytes(env, address, size));
			item.Set("prefixLength", static_cast<uint32_t>(route->rtm_dst_len));
			item.Set("type", static_cast<uint32_t>(route->rtm_type));
			result.Set(result.Length(), item);
		});
		/* A kernel without IPv6 has no table to dump. */
		if (error != EAFNOSUPPORT && error != EOPNOTSUPP) {
			CheckErrno(env, -error, error, "netlink(RTM_GETROUTE)", subject());
		}
	}
	return result;
}

Napi::Value NetNs::SetUp(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	std::string name = TextArgument(info, 0, "interfaceName");
	if (name.empty() || name.size() >= IFNAMSIZ) {
		throw Napi::RangeError::New(env, "Expected `interfaceName` to have 1 to 15 bytes, got " + std::to_string(name.size()));
	}
	int any = SocketInside(env, AF_INET, SOCK_DGRAM, 0);
	ifreq request{};
	memcpy(request.ifr_name, name.c_str(), name.size());
	int error = ioctl(any, SIOCGIFFLAGS, &request) ? errno : 0;
	if (!error) {
		request.ifr_flags = static_cast<short>(request.ifr_flags | IFF_UP);
		error = ioctl(any, SIOCSIFFLAGS, &request) ? errno : 0;
	}
	close(any);
	CheckErrno(env, -error, error, "ioctl(SIOCSIFFLAGS)", name);
	return env.Undefined();
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
