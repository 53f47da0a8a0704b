/*
 * flows [--silent]: says of each flow on its input where it came out.
 *
 *   tcp|udp ADDRESS:PORT SOURCE:0|- MARK UID GID WAIT_MS   →   outbound|inbound|dns|pass ERROR
 *   look WAIT_MS                                           →   the same, about a flow that somebody else made
 *
 * Listens where a mesh's proxy does, and so knows what was captured; with --silent it does not. All flows are made without waiting for an answer.
 */
#include <poll.h>
#include <sys/fsuid.h>

#include "net.h"

static const struct {
	const char *address, *name;
	int type;
} PORTS[] = {
	{"[::]:15001", "outbound", SOCK_STREAM},
	{"[::]:15006", "inbound", SOCK_STREAM},
	{"[::]:15053", "dns", SOCK_STREAM},
	{"[::]:15053", "dns", SOCK_DGRAM},
};
enum { PORT_COUNT = sizeof(PORTS) / sizeof(PORTS[0]) };

static struct pollfd listeners[PORT_COUNT];
static int listener_count;

static const char *look(int wait_ms)
{
	const char *found = "pass";
	char byte;

	if (poll(listeners, listener_count, wait_ms) <= 0)
		return found;
	for (int i = 0; i < listener_count; i++) {
		if (!(listeners[i].revents & POLLIN))
			continue;
		found = PORTS[i].name;
		if (PORTS[i].type == SOCK_STREAM)
			close(accept(listeners[i].fd, NULL, NULL));
		else
			recv(listeners[i].fd, &byte, 1, 0);
	}
	return found;
}

/* Real ids, and those that the owner match looks at; the effective one stays root's, for SO_MARK. */
static void become(int uid, int gid)
{
	if (setresgid(gid, 0, 0) || setresuid(uid, 0, 0))
		misuse("not root");
	setfsgid(gid);
	setfsuid(uid);
}

/* @return 0 or an errno */
static int make(bool tcp, const char *to, const char *from, int mark, int uid, int gid, int *fd)
{
	union address destination = parse_address(to), source = {0};
	int on = 1;

	if (strcmp(from, "-"))
		source = parse_address(from);
	become(uid, gid);
	*fd = socket(destination.any.sa_family, (tcp ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (*fd < 0)
		return errno;
	if (mark && setsockopt(*fd, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return errno;
	setsockopt(*fd, SOL_SOCKET, SO_BROADCAST, &on, sizeof(on));
	if (source.any.sa_family && bind(*fd, &source.any, address_size(&source)))
		return errno;
	if (tcp && connect(*fd, &destination.any, address_size(&destination)) && errno != EINPROGRESS)
		return errno;
	if (!tcp && sendto(*fd, "?", 1, 0, &destination.any, address_size(&destination)) < 0)
		return errno;
	return 0;
}

int main(int argc, char **argv)
{
	char line[512], protocol[8], to[TEXT_MAX], from[TEXT_MAX];
	int mark, uid, gid, wait_ms;

	prepare_process();
	if (argc == 1) {
		for (int i = 0; i < PORT_COUNT; i++) {
			int fd = socket_at(PORTS[i].address, PORTS[i].type, NULL);

			if (PORTS[i].type == SOCK_STREAM)
				listen(fd, 128);
			listeners[listener_count++] = (struct pollfd){.fd = fd, .events = POLLIN};
		}
	} else if (argc != 2 || strcmp(argv[1], "--silent")) {
		misuse(argv[1]);
	}
	puts("{\"ready\":true}");
	while (fgets(line, sizeof(line), stdin)) {
		int fd = -1, error = 0;
		const char *found;

		if (sscanf(line, "look %d", &wait_ms) != 1) {
			if (sscanf(line, "%7s %95s %95s %d %d %d %d", protocol, to, from, &mark, &uid, &gid, &wait_ms) != 7)
				misuse(line);
			error = make(!strcmp(protocol, "tcp"), to, from, mark, uid, gid, &fd);
			become(0, 0);
		}
		found = look(wait_ms);
		printf("\"%s %s\"\n", found, error ? errno_name(error) : "-");
		if (fd >= 0)
			close(fd);
	}
	return 0;
}
