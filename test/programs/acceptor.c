/* acceptor ADDRESS:PORT: stands in for a proxy that costs as little as possible. Tells each client its original destination, and closes. */
#include <fcntl.h>

#include "net.h"

int main(int argc, char **argv)
{
	char destination[TEXT_MAX];
	int listener, fd;

	prepare_process();
	if (argc != 2)
		misuse("acceptor ADDRESS:PORT");
	listener = listen_at(argv[1]);
	fcntl(listener, F_SETFL, 0);
	puts("{\"ready\":true}");
	while ((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
		dprintf(fd, "{\"original_dst\":\"%s\"}\n", original_dst_of(fd, SOL_IP, destination));
		close(fd);
	}
	perror("accept");
	return 1;
}
