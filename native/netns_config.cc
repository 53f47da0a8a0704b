#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/fib_rules.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "arguments.h"
#include "classes.h"
#include "netlink.h"

namespace {

bool IsAddArgument(const Napi::CallbackInfo& info) {
	std::string change = TextArgument(info, 0, "change");
	if (change != "add" && change != "delete") {
		throw Napi::RangeError::New(info.Env(), "Expected `change` to be 'add' or 'delete', got '" + change + "'");
	}
	return change == "add";
}

std::string InterfaceNameOf(Napi::Env env, Napi::Value value) {
	if (!value.IsString()) {
		throw Napi::TypeError::New(env, "Expected `interfaceName` to be a string");
	}
	std::string name = value.As<Napi::String>().Utf8Value();
	if (name.empty() || name.size() >= IFNAMSIZ) {
		throw Napi::RangeError::New(env, "Expected `interfaceName` to have 1 to 15 bytes, got " + std::to_string(name.size()));
	}
	return name;
}

ifreq InterfaceRequest(const std::string& name) {
	ifreq request{};
	memcpy(request.ifr_name, name.c_str(), name.size());
	return request;
}

int InterfaceIndex(Napi::Env env, const Netlink& netlink, const std::string& name) {
	ifreq request = InterfaceRequest(name);
	Checked(env, "ioctl(SIOCGIFINDEX)", name, [&] { return ioctl(netlink.fd(), SIOCGIFINDEX, &request); });
	return request.ifr_ifindex;
}

/* `address`, `prefixLength` and `interfaceName` of an object. */
struct Prefix {
	IpAddress address;
	uint8_t length;
	std::string interface;

	static Prefix Of(Napi::Env env, Napi::Object object) {
		IpAddress address = IpAddress::Of(env, object.Get("address"));
		auto length = IntegerOf(env, object.Get("prefixLength"), "prefixLength", 0, static_cast<int64_t>(8 * address.size));
		return {address, static_cast<uint8_t>(length), InterfaceNameOf(env, object.Get("interfaceName"))};
	}

	std::string Text() const { return address.Text() + "/" + std::to_string(length) + " dev " + interface; }
};

template <typename Body>
Request<Body> ChangeRequest(bool add, uint16_t add_type, uint16_t delete_type) {
	return add ? Request<Body>(add_type, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL) : Request<Body>(delete_type, NLM_F_ACK);
}

/* `unchanged`: the errno that says that all is as it should be already. */
Napi::Value Changed(Napi::Env env, int error, int unchanged, const char* syscall, const std::string& subject) {
	if (error != unchanged) {
		CheckErrno(env, -error, error, syscall, subject);
	}
	return Napi::Boolean::New(env, error == 0);
}

std::string SysctlPath(Napi::Env env, const std::string& directory, Napi::Value value) {
	std::string name = value.IsString() ? value.As<Napi::String>().Utf8Value() : throw Napi::TypeError::New(env, "Expected the name of a sysctl to be a string");
	if (name.empty() || name[0] == '/' || ("/" + name + "/").find("/../") != std::string::npos) {
		throw Napi::RangeError::New(env, "Expected the name of a sysctl to be a path below " + directory + "/sys, got '" + name + "'");
	}
	return directory + "/sys/" + name;
}

Outcome ReadText(const std::string& path, std::string& text) {
	Outcome opened = Outcome::Of(open(path.c_str(), O_RDONLY | O_CLOEXEC), "open");
	if (opened.error) {
		return opened;
	}
	OwnedFd file{opened.fd};
	char chunk[4096];
	for (;;) {
		ssize_t got = read(file.fd, chunk, sizeof(chunk));
		if (got <= 0) {
			return Outcome::Of(static_cast<int>(got), "read");
		}
		text.append(chunk, static_cast<size_t>(got));
	}
}

}  // namespace

Napi::Value NetNs::SetUp(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	std::string name = InterfaceNameOf(env, info[0]);
	OwnedFd any{SocketInside(env, AF_INET, SOCK_DGRAM, 0)};
	ifreq request = InterfaceRequest(name);
	Checked(env, "ioctl(SIOCGIFFLAGS)", name, [&] { return ioctl(any.fd, SIOCGIFFLAGS, &request); });
	request.ifr_flags = static_cast<short>(request.ifr_flags | IFF_UP);
	Checked(env, "ioctl(SIOCSIFFLAGS)", name, [&] { return ioctl(any.fd, SIOCSIFFLAGS, &request); });
	return env.Undefined();
}

Napi::Value NetNs::ChangeRule(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	bool add = IsAddArgument(info);
	Napi::Object rule = ObjectArgument(info, 1, "rule");
	auto family = IntegerOf(env, rule.Get("family"), "family", 4, 6);
	if (family == 5) {
		throw Napi::RangeError::New(env, "Expected `family` to be 4 or 6");
	}
	auto priority = static_cast<uint32_t>(IntegerOf(env, rule.Get("priority"), "priority", 0, UINT32_MAX));
	/* Table 0 makes the kernel choose one. To a delete, a mark or mask of 0 is any: the kernel's own rules would fit. */
	auto table = static_cast<uint32_t>(IntegerOf(env, rule.Get("table"), "table", 1, UINT32_MAX));
	auto mark = static_cast<uint32_t>(IntegerOf(env, rule.Get("mark"), "mark", 1, UINT32_MAX));
	auto mask = static_cast<uint32_t>(IntegerOf(env, rule.Get("mask"), "mask", 1, UINT32_MAX));

	auto request = ChangeRequest<fib_rule_hdr>(add, RTM_NEWRULE, RTM_DELRULE);
	request.body.family = family == 4 ? AF_INET : AF_INET6;
	request.body.action = FR_ACT_TO_TBL;
	request.Add(FRA_PRIORITY, priority);
	request.Add(FRA_TABLE, table);
	request.Add(FRA_FWMARK, mark);
	request.Add(FRA_FWMASK, mask);
	Netlink& netlink = Route(env);
	return Changed(env, netlink.Ask(&request.header), add ? EEXIST : ENOENT, add ? "netlink(RTM_NEWRULE)" : "netlink(RTM_DELRULE)",
		"IPv" + std::to_string(family) + " rule of priority " + std::to_string(priority));
}

Napi::Value NetNs::ChangeLocalRoute(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	bool add = IsAddArgument(info);
	Napi::Object route = ObjectArgument(info, 1, "route");
	Prefix prefix = Prefix::Of(env, route);
	/* Table 0 would be the main one. */
	auto table = static_cast<uint32_t>(IntegerOf(env, route.Get("table"), "table", 1, UINT32_MAX));

	Netlink& netlink = Route(env);
	auto request = ChangeRequest<rtmsg>(add, RTM_NEWROUTE, RTM_DELROUTE);
	request.body.rtm_family = prefix.address.family();
	request.body.rtm_dst_len = prefix.length;
	/* To a delete, none is any: whoever added it. */
	request.body.rtm_protocol = add ? RTPROT_BOOT : RTPROT_UNSPEC;
	request.body.rtm_scope = RT_SCOPE_HOST;
	request.body.rtm_type = RTN_LOCAL;
	request.Add(RTA_DST, prefix.address.bytes, prefix.address.size);
	request.Add(RTA_OIF, static_cast<uint32_t>(InterfaceIndex(env, netlink, prefix.interface)));
	request.Add(RTA_TABLE, table);
	int error = netlink.Ask(&request.header);
	/* ::/0 on lo fits the null route that is at the root of every IPv6 table; the kernel refuses to delete that one with another word. */
	if (!add && error == ENOENT) {
		error = ESRCH;
	}
	return Changed(env, error, add ? EEXIST : ESRCH, add ? "netlink(RTM_NEWROUTE)" : "netlink(RTM_DELROUTE)",
		"local " + prefix.Text() + " table " + std::to_string(table));
}

Napi::Value NetNs::ChangeAddress(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	bool add = IsAddArgument(info);
	Prefix prefix = Prefix::Of(env, ObjectArgument(info, 1, "address"));

	Netlink& netlink = Route(env);
	auto request = ChangeRequest<ifaddrmsg>(add, RTM_NEWADDR, RTM_DELADDR);
	bool is_ipv4 = prefix.address.family() == AF_INET;
	request.body.ifa_family = prefix.address.family();
	request.body.ifa_prefixlen = prefix.length;
	request.body.ifa_flags = is_ipv4 ? 0 : IFA_F_NODAD;
	/* As ip does; of IPv6 the kernel knows the scope by itself. */
	request.body.ifa_scope = is_ipv4 && prefix.address.bytes[0] == 127 ? RT_SCOPE_HOST : RT_SCOPE_UNIVERSE;
	request.body.ifa_index = static_cast<uint32_t>(InterfaceIndex(env, netlink, prefix.interface));
	request.Add(IFA_LOCAL, prefix.address.bytes, prefix.address.size);
	request.Add(IFA_ADDRESS, prefix.address.bytes, prefix.address.size);
	return Changed(env, netlink.Ask(&request.header), add ? EEXIST : EADDRNOTAVAIL, add ? "netlink(RTM_NEWADDR)" : "netlink(RTM_DELADDR)", prefix.Text());
}

Napi::Value NetNs::Sysctls(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	std::string directory = TextArgument(info, 0, "procDirectory");
	if (!info[1].IsArray()) {
		throw Napi::TypeError::New(env, "Expected `names` to be an array");
	}
	Napi::Array names = info[1].As<Napi::Array>();
	std::vector<std::string> paths;
	for (uint32_t index = 0; index < names.Length(); index++) {
		paths.push_back(SysctlPath(env, directory, names.Get(index)));
	}
	std::vector<std::string> texts(paths.size());
	/* Of the one that failed, in the end: it is thrown about. */
	std::string subject = directory;
	Inside(env, subject, [&] {
		Outcome outcome;
		for (size_t index = 0; index < paths.size() && !outcome.error; index++) {
			subject = paths[index];
			outcome = ReadText(subject, texts[index]);
		}
		return outcome;
	});
	Napi::Array result = Napi::Array::New(env, texts.size());
	for (uint32_t index = 0; index < texts.size(); index++) {
		std::string& text = texts[index];
		if (!text.empty() && text.back() == '\n') {
			text.pop_back();
		}
		result.Set(index, text);
	}
	return result;
}

Napi::Value NetNs::SetSysctl(const Napi::CallbackInfo& info) {
	std::string path = SysctlPath(info.Env(), TextArgument(info, 0, "procDirectory"), info[1]);
	std::string value = TextArgument(info, 2, "value");
	/* Writing nothing changes nothing, and the kernel calls that a success. */
	if (value.empty()) {
		throw Napi::RangeError::New(info.Env(), "Expected `value` not to be empty");
	}
	Inside(info.Env(), path, [&] {
		Outcome opened = Outcome::Of(open(path.c_str(), O_WRONLY | O_CLOEXEC), "open");
		if (opened.error) {
			return opened;
		}
		OwnedFd file{opened.fd};
		return Outcome::Of(static_cast<int>(write(file.fd, value.data(), value.size())), "write");
	});
	return info.Env().Undefined();
}
