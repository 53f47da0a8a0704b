#include <linux/fib_rules.h>
#include <net/if.h>

#include "arguments.h"
#include "classes.h"
#include "netlink.h"

namespace {

struct Interface {
	std::string name;
	unsigned flags = 0;
};

/* By index. */
std::map<int, Interface> InterfacesOf(Napi::Env env, Netlink& netlink, const std::string& subject) {
	std::map<int, Interface> interfaces;
	Request<ifinfomsg> request(RTM_GETLINK, NLM_F_DUMP);
	int error = netlink.Ask(&request.header, [&](nlmsghdr* message) {
		auto* link = static_cast<ifinfomsg*>(NLMSG_DATA(message));
		Attributes attributes = AttributesOf<ifinfomsg>(message);
		auto name = attributes.find(IFLA_IFNAME);
		interfaces[link->ifi_index] = {name == attributes.end() ? "" : static_cast<char*>(RTA_DATA(name->second)), link->ifi_flags};
	});
	CheckErrno(env, -error, error, "netlink(RTM_GETLINK)", subject);
	return interfaces;
}

/* A kernel without IPv6 has nothing of it to dump. */
void CheckDump(Napi::Env env, int error, const char* syscall, const std::string& subject) {
	if (error != EAFNOSUPPORT && error != EOPNOTSUPP) {
		CheckErrno(env, -error, error, syscall, subject);
	}
}

uint32_t InterfaceIndexOf(const Attributes& attributes) {
	auto hops = attributes.find(RTA_MULTIPATH);
	if (hops != attributes.end() && RTA_PAYLOAD(hops->second) >= sizeof(rtnexthop)) {
		return static_cast<uint32_t>(static_cast<rtnexthop*>(RTA_DATA(hops->second))->rtnh_ifindex);
	}
	return NumberOr(attributes, RTA_OIF, 0);
}

/* Those of one table, or of all of them when it is RT_TABLE_UNSPEC. */
Napi::Array RoutesOf(Napi::Env env, Netlink& netlink, uint32_t only_table, const std::string& subject) {
	Napi::Array result = Napi::Array::New(env);
	for (int family : {AF_INET, AF_INET6}) {
		Request<rtmsg> request(RTM_GETROUTE, NLM_F_DUMP);
		request.body.rtm_family = static_cast<unsigned char>(family);
		int error = netlink.Ask(&request.header, [&](nlmsghdr* message) {
			auto* route = static_cast<rtmsg*>(NLMSG_DATA(message));
			/* Asked for a family that it does not have, the kernel dumps those that it has. */
			if (message->nlmsg_type != RTM_NEWROUTE || route->rtm_family != family || (route->rtm_flags & RTM_F_CLONED)) {
				return;
			}
			Attributes attributes = AttributesOf<rtmsg>(message);
			uint32_t table = NumberOr(attributes, RTA_TABLE, route->rtm_table);
			if (only_table != RT_TABLE_UNSPEC && table != only_table) {
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
			item.Set("table", table);
			item.Set("type", static_cast<uint32_t>(route->rtm_type));
			item.Set("address", CopyBytes(env, address, size));
			item.Set("prefixLength", static_cast<uint32_t>(route->rtm_dst_len));
			item.Set("interfaceIndex", InterfaceIndexOf(attributes));
			item.Set("metric", NumberOr(attributes, RTA_PRIORITY, 0));
			result.Set(result.Length(), item);
		});
		CheckDump(env, error, "netlink(RTM_GETROUTE)", subject);
	}
	return result;
}

}  // namespace

Napi::Value NetNs::Interfaces(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Netlink& netlink = Route(env);
	Napi::Array result = Napi::Array::New(env);
	for (auto& [index, interface] : InterfacesOf(env, netlink, subject())) {
		Napi::Object item = Napi::Object::New(env);
		item.Set("index", index);
		item.Set("name", interface.name);
		item.Set("isLoopback", Napi::Boolean::New(env, (interface.flags & IFF_LOOPBACK) != 0));
		item.Set("isUp", Napi::Boolean::New(env, (interface.flags & IFF_UP) != 0));
		result.Set(result.Length(), item);
	}
	return result;
}

Napi::Value NetNs::Addresses(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Netlink& netlink = Route(env);
	std::map<int, Interface> interfaces = InterfacesOf(env, netlink, subject());
	Napi::Array result = Napi::Array::New(env);
	Request<ifaddrmsg> request(RTM_GETADDR, NLM_F_DUMP);
	int error = netlink.Ask(&request.header, [&](nlmsghdr* message) {
		auto* entry = static_cast<ifaddrmsg*>(NLMSG_DATA(message));
		Attributes attributes = AttributesOf<ifaddrmsg>(message);
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

Napi::Value NetNs::Routes(const Napi::CallbackInfo& info) {
	Netlink& netlink = Route(info.Env());
	return RoutesOf(info.Env(), netlink, RT_TABLE_UNSPEC, subject());
}

Napi::Value NetNs::LocalRoutes(const Napi::CallbackInfo& info) {
	Netlink& netlink = Route(info.Env());
	return RoutesOf(info.Env(), netlink, RT_TABLE_LOCAL, subject());
}

Napi::Value NetNs::Rules(const Napi::CallbackInfo& info) {
	Napi::Env env = info.Env();
	Netlink& netlink = Route(env);
	Napi::Array result = Napi::Array::New(env);
	for (int family : {AF_INET, AF_INET6}) {
		Request<fib_rule_hdr> request(RTM_GETRULE, NLM_F_DUMP);
		request.body.family = static_cast<uint8_t>(family);
		int error = netlink.Ask(&request.header, [&](nlmsghdr* message) {
			auto* rule = static_cast<fib_rule_hdr*>(NLMSG_DATA(message));
			if (message->nlmsg_type != RTM_NEWRULE || rule->family != family) {
				return;
			}
			Attributes attributes = AttributesOf<fib_rule_hdr>(message);
			Napi::Object item = Napi::Object::New(env);
			item.Set("family", family == AF_INET ? 4 : 6);
			item.Set("priority", NumberOr(attributes, FRA_PRIORITY, 0));
			item.Set("table", rule->action == FR_ACT_TO_TBL ? NumberOr(attributes, FRA_TABLE, rule->table) : 0);
			item.Set("mark", NumberOr(attributes, FRA_FWMARK, 0));
			item.Set("mask", NumberOr(attributes, FRA_FWMASK, 0));
			result.Set(result.Length(), item);
		});
		CheckDump(env, error, "netlink(RTM_GETRULE)", subject());
	}
	return result;
}
