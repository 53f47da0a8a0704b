/*
 * The chained CNI plugin: holds a pod's start until the node agent says that the pod is captured. The container runtime runs it, on a host that may
 * have nothing else of ours, so it is one static program.
 *
 * It changes nothing itself. ADD and CHECK ask the agent, over HTTP on a unix socket (src/cni/server.ts has the other side), and fail the pod's start
 * when the answer is no, or when there is none in time: a pod must not start uncaptured. DEL tells the agent and never fails: a pod that cannot end
 * is worse than one that the agent has to notice by itself. https://www.cni.dev/docs/spec/
 */
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

using Json = nlohmann::ordered_json;

static constexpr size_t kMaxInput = 1024 * 1024;
/* A result nests four deep, a configuration hardly more. Printing needs stack for each level. */
static constexpr int kMaxDepth = 64;
static constexpr size_t kMaxAnswer = 64 * 1024;
static constexpr char kDefaultSocket[] = "/var/run/sidestep/cni.sock";
/* src/cni/install.ts says where the number comes from. */
static constexpr int kDefaultTimeoutSeconds = 60;
static constexpr int kMaxTimeoutSeconds = 600;
/* For an agent that has the socket and does not answer. */
static constexpr int kDelTimeoutMs = 2000;
static constexpr int kFirstPauseMs = 20;
static constexpr int kLongestPauseMs = 250;

/* Newest last. 0.3.0 brought chains. */
static constexpr const char* kVersions[] = {"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"};

/* Of the specification, section "Error". */
enum Code {
	INCOMPATIBLE_VERSION = 1,
	BAD_ENVIRONMENT = 4,
	IO_FAILURE = 5,
	UNDECODABLE = 6,
	BAD_CONFIGURATION = 7,
	TRY_AGAIN_LATER = 11,
	/* 100 and up are a plugin's own. */
	REFUSED_BY_AGENT = 100,
};

struct Failure {
	Code code;
	std::string message;
	std::string details = {};
};

static std::string ErrnoText(int error) { return std::string(strerrorname_np(error) ? strerrorname_np(error) : "?") + ": " + strerror(error); }

static void Log(const std::string& line) {
	std::string text = "sidestep-cni: " + line + "\n";
	/* A log that cannot be written is no reason to fail. */
	[[maybe_unused]] ssize_t written = write(STDERR_FILENO, text.data(), text.size());
}

static int64_t NowMs() {
	timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void Print(const std::string& text) {
	for (size_t done = 0; done < text.size();) {
		ssize_t written = write(STDOUT_FILENO, text.data() + done, text.size() - done);
		if (written < 0 && errno != EINTR) {
			throw Failure{IO_FAILURE, "the result could not be written (" + ErrnoText(errno) + ")"};
		}
		done += written > 0 ? static_cast<size_t>(written) : 0;
	}
}

/* --- what the runtime gives */

static std::string ReadInput() {
	std::string input;
	char chunk[65536];
	for (;;) {
		ssize_t length = read(STDIN_FILENO, chunk, sizeof(chunk));
		if (length < 0 && errno == EINTR) {
			continue;
		}
		if (length < 0) {
			throw Failure{IO_FAILURE, "the network configuration could not be read (" + ErrnoText(errno) + ")"};
		}
		if (length == 0) {
			return input;
		}
		input.append(chunk, static_cast<size_t>(length));
		if (input.size() > kMaxInput) {
			throw Failure{UNDECODABLE, "the network configuration is larger than " + std::to_string(kMaxInput) + " bytes"};
		}
	}
}

/* Iterates over text, and tells how much of it was taken, also by copies of itself. */
struct Taken {
	using difference_type = ptrdiff_t;
	using value_type = char;
	using pointer = const char*;
	using reference = const char&;
	using iterator_category = std::input_iterator_tag;

	const char* at;
	size_t* count;

	const char& operator*() const { return *at; }
	Taken& operator++() {
		++at;
		++*count;
		return *this;
	}
	bool operator==(const Taken& other) const { return at == other.at; }
	bool operator!=(const Taken& other) const { return at != other.at; }
};

struct NetConf {
	std::string version;
	std::string socket = kDefaultSocket;
	int timeout_seconds = kDefaultTimeoutSeconds;
	/* Namespaces whose pods start without asking: they must, where the agent cannot run without them. */
	std::vector<std::string> excluded;
	Json previous;
	/* The same, as it was written: what a chained plugin that changes nothing prints. */
	std::string previous_text;
};

static Json ParseInput(const std::string& input, std::string& previous_text) {
	size_t taken = 0, begin = 0;
	bool is_next = false, is_inside = false;
	auto follow = [&](int depth, Json::parse_event_t event, Json& parsed) {
		using Event = Json::parse_event_t;
		if (depth > kMaxDepth) {
			throw Failure{UNDECODABLE, "the network configuration is nested deeper than " + std::to_string(kMaxDepth)};
		}
		/* An event comes when its last character was taken, and no further one. */
		if (depth == 1 && event == Event::key) {
			is_next = parsed == "prevResult";
			if (is_next) {
				previous_text.clear();
			}
		} else if (depth == 1 && event == Event::object_start && is_next) {
			begin = taken - 1;
			is_inside = true;
		} else if (depth == 1 && event == Event::object_end && is_inside) {
			previous_text = input.substr(begin, taken - begin);
			is_inside = false;
		}
		return true;
	};
	try {
		const char* text = input.data();
		return Json::parse(Taken{text, &taken}, Taken{text + input.size(), &taken}, follow);
	} catch (const Json::exception& error) {
		throw Failure{UNDECODABLE, "the network configuration is not JSON", error.what()};
	}
}

static NetConf ParseNetConf(const std::string& input, std::string& version) {
	NetConf conf;
	Json json = ParseInput(input, conf.previous_text);
	if (!json.is_object()) {
		throw Failure{UNDECODABLE, "the network configuration is not an object"};
	}
	auto wrong = [](const char* key, const std::string& expected, const Json& value) {
		return Failure{BAD_CONFIGURATION, std::string("the network configuration's ") + key + " is not as expected",
			"expected " + expected + ", got " + value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 200)};
	};
	Json given = json.value("cniVersion", Json());
	if (!given.is_string() || std::find(std::begin(kVersions), std::end(kVersions), given.get<std::string>()) == std::end(kVersions)) {
		throw Failure{INCOMPATIBLE_VERSION, "incompatible CNI versions", "sidestep-cni takes 0.3.0, 0.3.1, 0.4.0, 1.0.0 and 1.1.0; the configuration says " +
			given.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 200)};
	}
	version = conf.version = given.get<std::string>();
	if (json.contains("socket")) {
		const Json& socket = json["socket"];
		if (!socket.is_string() || socket.get_ref<const std::string&>().empty() || socket.get_ref<const std::string&>()[0] != '/' ||
			socket.get_ref<const std::string&>().size() >= sizeof(sockaddr_un::sun_path) || socket.get_ref<const std::string&>().find('\0') != std::string::npos) {
			throw wrong("socket", "an absolute path of at most " + std::to_string(sizeof(sockaddr_un::sun_path) - 1) + " bytes", socket);
		}
		conf.socket = socket.get<std::string>();
	}
	if (json.contains("timeoutSeconds")) {
		const Json& seconds = json["timeoutSeconds"];
		if (!seconds.is_number_integer() || seconds.get<int64_t>() < 1 || seconds.get<int64_t>() > kMaxTimeoutSeconds) {
			throw wrong("timeoutSeconds", "a whole number from 1 to " + std::to_string(kMaxTimeoutSeconds), seconds);
		}
		conf.timeout_seconds = static_cast<int>(seconds.get<int64_t>());
	}
	if (json.contains("excludeNamespaces")) {
		const Json& names = json["excludeNamespaces"];
		if (!names.is_array() || !std::all_of(names.begin(), names.end(), [](const Json& name) { return name.is_string(); })) {
			throw wrong("excludeNamespaces", "a list of names", names);
		}
		conf.excluded = names.get<std::vector<std::string>>();
	}
	conf.previous = json.value("prevResult", Json());
	return conf;
}

static std::string Environment(const char* name, bool is_required) {
	const char* value = getenv(name);
	if (is_required && (!value || !*value)) {
		throw Failure{BAD_ENVIRONMENT, std::string(name) + " is not set", "the container runtime has to say it"};
	}
	return value ? value : "";
}

/* `K=V;K=V`. */
static std::map<std::string, std::string> ParseArguments(const std::string& text) {
	std::map<std::string, std::string> arguments;
	for (size_t at = 0; at < text.size();) {
		size_t end = std::min(text.find(';', at), text.size());
		std::string pair = text.substr(at, end - at);
		size_t equals = pair.find('=');
		if (equals == std::string::npos && !pair.empty()) {
			/* Passing over it might miss that this is a pod. */
			throw Failure{BAD_ENVIRONMENT, "CNI_ARGS is not as expected", "expected key=value;key=value, got " + pair.substr(0, 200)};
		}
		if (!pair.empty()) {
			arguments[pair.substr(0, equals)] = pair.substr(equals + 1);
		}
		at = end + 1;
	}
	return arguments;
}

/* Of the result so far, without prefix lengths. */
static Json PodAddresses(const Json& previous) {
	Json addresses = Json::array();
	Json ips = previous.is_object() ? previous.value("ips", Json::array()) : Json::array();
	for (const Json& ip : ips.is_array() ? ips : Json::array()) {
		Json address = ip.is_object() ? ip.value("address", Json()) : Json();
		if (!address.is_string()) {
			throw Failure{UNDECODABLE, "prevResult has an entry in `ips` without an address"};
		}
		std::string text = address.get<std::string>();
		addresses.push_back(text.substr(0, text.find('/')));
	}
	return addresses;
}

/* --- the agent */

struct Answer {
	int status;
	std::string body;
};

/* No answer this time, and there may be one the next time. */
struct NoAnswer {
	std::string why;
};

struct Socket {
	int fd;
	explicit Socket(int fd) : fd(fd) {}
	Socket(const Socket&) = delete;
	~Socket() { close(fd); }
};

static void WaitFor(int fd, short events, int64_t deadline) {
	for (;;) {
		pollfd waiting = {fd, events, 0};
		int64_t left = deadline - NowMs();
		if (left <= 0) {
			throw NoAnswer{"it took the call and did not answer in time"};
		}
		int ready = poll(&waiting, 1, static_cast<int>(left));
		if (ready > 0) {
			return;
		}
		if (ready < 0 && errno != EINTR) {
			throw Failure{IO_FAILURE, "poll failed (" + ErrnoText(errno) + ")"};
		}
	}
}

static bool IsAgentAway(int error) {
	/* EAGAIN: its queue of connections is full. */
	return error == ENOENT || error == ECONNREFUSED || error == ECONNRESET || error == EPIPE || error == EAGAIN;
}

static void Connect(int fd, const std::string& path) {
	sockaddr_un address = {};
	address.sun_family = AF_UNIX;
	memcpy(address.sun_path, path.data(), path.size());
	if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) {
		return;
	}
	int error = errno;
	if (IsAgentAway(error)) {
		throw NoAnswer{"connect: " + ErrnoText(error)};
	}
	throw Failure{IO_FAILURE, "the sidestep agent's socket " + path + " cannot be used (connect: " + ErrnoText(error) + ")", "look at what is at that path on the node"};
}

/* Up to the whole answer, or less where the agent ended it early. */
static std::string Exchange(const std::string& path, const std::string& request, int64_t deadline) {
	Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
	if (socket.fd < 0) {
		throw Failure{IO_FAILURE, "socket failed (" + ErrnoText(errno) + ")"};
	}
	Connect(socket.fd, path);
	for (size_t sent = 0; sent < request.size();) {
		ssize_t length = send(socket.fd, request.data() + sent, request.size() - sent, MSG_NOSIGNAL);
		if (length >= 0) {
			sent += static_cast<size_t>(length);
		} else if (errno == EAGAIN) {
			WaitFor(socket.fd, POLLOUT, deadline);
		} else if (errno == EPIPE || errno == ECONNRESET) {
			/* It may have answered before it closed. */
			break;
		} else if (errno != EINTR) {
			throw Failure{IO_FAILURE, "the call could not be sent to the sidestep agent (" + ErrnoText(errno) + ")"};
		}
	}
	std::string answer;
	char chunk[4096];
	while (answer.size() < kMaxAnswer) {
		ssize_t length = recv(socket.fd, chunk, sizeof(chunk), 0);
		if (length > 0) {
			answer.append(chunk, static_cast<size_t>(length));
		} else if (length == 0 || errno == ECONNRESET) {
			break;
		} else if (errno == EAGAIN) {
			WaitFor(socket.fd, POLLIN, deadline);
		} else if (errno != EINTR) {
			throw Failure{IO_FAILURE, "the sidestep agent's answer could not be read (" + ErrnoText(errno) + ")"};
		}
	}
	return answer;
}

static Answer Ask(const std::string& path, const char* command, const std::string& body, int64_t deadline) {
	/* 1.0, so that the answer comes in one piece and ends with the connection. */
	std::string text = Exchange(path, std::string("POST ") + command + " HTTP/1.0\r\nHost: sidestep\r\nContent-Type: application/json\r\nContent-Length: " +
		std::to_string(body.size()) + "\r\n\r\n" + body, deadline);
	static constexpr char kStart[] = "HTTP/1.";
	size_t end = text.find("\r\n\r\n");
	if (text.compare(0, sizeof(kStart) - 1, kStart, std::min(text.size(), sizeof(kStart) - 1)) != 0) {
		throw Failure{IO_FAILURE, "what answers at " + path + " is not the sidestep agent", text.substr(0, 200)};
	}
	if (end == std::string::npos) {
		throw NoAnswer{"it closed the connection without an answer"};
	}
	int status = 0;
	if (sscanf(text.c_str(), "HTTP/1.%*1[01] %3d", &status) != 1 || status < 100) {
		throw Failure{IO_FAILURE, "what answers at " + path + " is not the sidestep agent", text.substr(0, 200)};
	}
	return {status, text.substr(end + 4)};
}

static void AskUntilAnswered(const NetConf& conf, const char* command, const std::string& body) {
	int64_t deadline = NowMs() + conf.timeout_seconds * 1000;
	/* Why not this time, and what the agent last said, which may be some tries ago. */
	std::string why, said;
	for (int pause = kFirstPauseMs;; pause = std::min(2 * pause, kLongestPauseMs)) {
		std::string before = why;
		try {
			Answer answer = Ask(conf.socket, command, body, deadline);
			if (answer.status == 200) {
				return;
			}
			if (answer.status != 503) {
				throw Failure{REFUSED_BY_AGENT, "the sidestep agent refused: " + answer.body.substr(0, 2000), "HTTP status " + std::to_string(answer.status) + " at " + conf.socket};
			}
			why = said = "it says: " + answer.body.substr(0, 2000);
		} catch (const NoAnswer& none) {
			why = none.why;
		}
		if (why != before) {
			Log("waiting for the agent at " + conf.socket + " (" + why + ")");
		}
		poll(nullptr, 0, static_cast<int>(std::clamp<int64_t>(deadline - NowMs(), 0, pause)));
		if (NowMs() >= deadline) {
			/* The last try mostly ends in the middle of a call. */
			std::string reason = said.empty() || said == why ? why : said + "; then: " + why;
			throw Failure{TRY_AGAIN_LATER, "the sidestep agent did not let the pod start in " + std::to_string(conf.timeout_seconds) + " s (" + reason + "): without it the pod would start uncaptured",
				"see whether the agent's pod on this node is ready, and its log; kubelet tries again by itself. Socket: " + conf.socket};
		}
	}
}

/* --- the commands */

static std::string Body(const NetConf& conf, const std::map<std::string, std::string>& arguments, bool is_add) {
	auto argument = [&](const char* key) {
		auto found = arguments.find(key);
		return found == arguments.end() ? std::string() : found->second;
	};
	Json body = {
		{"Netns", Environment("CNI_NETNS", is_add)},
		{"PodName", argument("K8S_POD_NAME")},
		{"PodNamespace", argument("K8S_POD_NAMESPACE")},
		{"PodUid", argument("K8S_POD_UID")},
		{"ContainerId", Environment("CNI_CONTAINERID", true)},
		{"IPs", PodAddresses(conf.previous)},
	};
	return body.dump(-1, ' ', false, Json::error_handler_t::replace);
}

static void Delete(const std::string& input, std::string& version) {
	try {
		NetConf conf = ParseNetConf(input, version);
		auto arguments = ParseArguments(Environment("CNI_ARGS", false));
		if (arguments.count("K8S_POD_NAME")) {
			Answer answer = Ask(conf.socket, "/cmddel", Body(conf, arguments, false), NowMs() + kDelTimeoutMs);
			if (answer.status != 200) {
				Log("DEL goes on, although the agent says: " + answer.body.substr(0, 2000));
			}
		}
	} catch (const NoAnswer& none) {
		Log("DEL goes on without the agent (" + none.why + ")");
	} catch (const Failure& failure) {
		Log("DEL goes on: " + failure.message + (failure.details.empty() ? "" : ": " + failure.details));
	}
}

static void AddOrCheck(const std::string& input, std::string& version, bool is_add) {
	NetConf conf = ParseNetConf(input, version);
	if (!is_add && conf.version < std::string("0.4.0")) {
		throw Failure{INCOMPATIBLE_VERSION, "CHECK needs cniVersion 0.4.0 or newer", "the configuration says " + conf.version};
	}
	if (conf.previous_text.empty()) {
		throw Failure{BAD_CONFIGURATION, "sidestep-cni was called without a prevResult", "it has to come after another plugin, in the plugins of a .conflist"};
	}
	Environment("CNI_IFNAME", true);
	auto arguments = ParseArguments(Environment("CNI_ARGS", false));
	std::string body = Body(conf, arguments, true);
	/* Others than pods are none of the agent's business, nor are pods that it leaves alone. */
	if (arguments.count("K8S_POD_NAME") && std::find(conf.excluded.begin(), conf.excluded.end(), arguments["K8S_POD_NAMESPACE"]) == conf.excluded.end()) {
		AskUntilAnswered(conf, is_add ? "/cmdadd" : "/cmdcheck", body);
	}
	if (is_add) {
		Print(conf.previous_text + "\n");
	}
}

static void Version(const std::string& input) {
	/* Whatever version is asked in, the answer is the same list. */
	Json json = Json::parse(input, nullptr, false);
	Json given = json.is_object() ? json.value("cniVersion", Json()) : Json();
	Json answer = {{"cniVersion", given.is_string() ? given : Json(kVersions[std::size(kVersions) - 1])}, {"supportedVersions", kVersions}};
	Print(answer.dump() + "\n");
}

static void Run(std::string& version) {
	std::string command = Environment("CNI_COMMAND", true);
	std::string input = ReadInput();
	if (command == "ADD" || command == "CHECK") {
		AddOrCheck(input, version, command == "ADD");
	} else if (command == "DEL") {
		Delete(input, version);
	} else if (command == "VERSION") {
		Version(input);
	} else if (command != "STATUS" && command != "GC") {
		/* STATUS: a node must not count as one without a network (NotReady) each time its agent restarts. GC: nothing of ours is left. */
		throw Failure{BAD_ENVIRONMENT, "CNI_COMMAND is not known", "expected ADD, DEL, CHECK, VERSION, STATUS or GC, got " + command.substr(0, 200)};
	}
}

int main() {
	std::string version = kVersions[std::size(kVersions) - 1];
	Failure failure;
	try {
		Run(version);
		return 0;
	} catch (const Failure& thrown) {
		failure = thrown;
	} catch (const std::exception& error) {
		failure = {IO_FAILURE, std::string("sidestep-cni failed: ") + error.what()};
	}
	Log(failure.message + (failure.details.empty() ? "" : ": " + failure.details));
	Json answer = {{"cniVersion", version}, {"code", failure.code}, {"msg", failure.message}, {"details", failure.details}};
	try {
		Print(answer.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
	} catch (const Failure&) {
		/* Nobody reads it. */
	}
	return 1;
}
