/*
 * connector ADDRESS:PORT WARM_UP COUNT GREETING: connects again and again, one connection at a time, and prints how long each connect(2) took, and each
 * connection from socket(2) to close(2), in ns. Each has to be greeted with what begins like GREETING.
 */
#include <sched.h>
#include <time.h>

#include "net.h"

static void fail(const char *what)
{
	fprintf(stderr, "connector: %s: %s\n", what, errno_name(errno));
	exit(1);
}

static long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void expect(int fd, const char *greeting)
{
	char got[256];
	ssize_t size = read(fd, got, sizeof(got) - 1);

	if (size < 0)
		fail("read");
	got[size] = 0;
	if (strncmp(got, greeting, strlen(greeting))) {
		fprintf(stderr, "connector: greeted with %s, not with %s\n", got, greeting);
		exit(1);
	}
}

struct sample {
	long connect, lifetime;
};

static struct sample connect_once(const union address *to, const char *greeting)
{
	/* Closing sends a reset: nothing waits in TIME_WAIT, and no port is used up. */
	struct linger reset = {.l_onoff = 1};
	long begun = now_ns(), connecting, connected;
	int fd = socket(to->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)))
		fail("socket");
	connecting = now_ns();
	if (connect(fd, &to->any, address_size(to)))
		fail("connect");
	connected = now_ns();
	expect(fd, greeting);
	close(fd);
	return (struct sample){.connect = connected - connecting, .lifetime = now_ns() - begun};
}

int main(int argc, char **argv)
{
	/* The proxy wakes up inside connect(2): it, like any other work on this CPU, has to wait until the connector sleeps. */
	struct sched_param first = {.sched_priority = 1};
	struct sample *samples;
	union address to;
	int warm_up, count;

	if (argc != 5)
		misuse("connector ADDRESS:PORT WARM_UP COUNT GREETING");
	to = parse_address(argv[1]);
	warm_up = atoi(argv[2]);
	count = atoi(argv[3]);
	samples = calloc(count, sizeof(*samples));
	if (sched_setscheduler(0, SCHED_FIFO, &first))
		fail("SCHED_FIFO");
	for (int i = 0; i < warm_up; i++)
		connect_once(&to, argv[4]);
	for (int i = 0; i < count; i++)
		samples[i] = connect_once(&to, argv[4]);
	for (int i = 0; i < count; i++)
		printf("{\"connect\":%ld,\"lifetime\":%ld}\n", samples[i].connect, samples[i].lifetime);
	return 0;
}
