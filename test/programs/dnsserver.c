/* dnsserver ADDRESS:PORT…: answers every DNS query over UDP and TCP with the address it was asked at and the one it was asked from. */
#include <poll.h>

#include "dns.h"

static void serve_connection(int listener, const char *server)
{
	struct timeval patience = {1, 0};
	char peer[TEXT_MAX];
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0)
		return;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	dns_serve_stream(fd, server, name_of(fd, getpeername, peer));
	close(fd);
}

int main(int argc, char **argv)
{
	struct pollfd *sockets = calloc(2 * argc, sizeof(*sockets));
	const int count = 2 * (argc - 1);
	char peer[TEXT_MAX];

	prepare_process();
	for (int i = 0; i < count; i++) {
		sockets[i].fd = i % 2 ? listen_at(argv[1 + i / 2]) : socket_at(argv[1 + i / 2], SOCK_DGRAM, NULL);
		sockets[i].events = POLLIN;
	}
	puts("{\"ready\":true}");
	for (;;) {
		poll(sockets, count, -1);
		for (int i = 0; i < count; i++) {
			if (!sockets[i].revents)
				continue;
			if (i % 2)
				serve_connection(sockets[i].fd, argv[1 + i / 2]);
			else
				dns_serve_datagram(sockets[i].fd, argv[1 + i / 2], peer);
		}
	}
}
