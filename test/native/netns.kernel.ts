import {spawnSync} from 'node:child_process';
import {readlinkSync} from 'node:fs';
import test, {type ExecutionContext} from 'ava';
import {type NetNs, native} from '../../src/native.js';
import {AF_INET, SOCK_STREAM, held, kernelError, listener, network, sockaddr, tcp} from './helpers.js';

const AF_INET6 = 10;
const text = (address: Uint8Array) => address.length === 4 ? address.join('.') : Buffer.from(address).toString('hex');

function ip(t: ExecutionContext, netns: NetNs, commands: readonly string[]): void {
	const {status, stderr} = spawnSync('nsenter', [`--net=/proc/${process.pid}/fd/${netns.fd}`, 'ip', '-batch', '-'], {input: commands.join('\n'), encoding: 'utf8'});
	t.is(status, 0, stderr);
}

test('two namespaces differ in inode and cookie, two handles of one do not', t => {
	const first = network(t);
	const second = network(t);
	t.not(first.inode, second.inode);
	t.not(first.cookie(), second.cookie());
	const again = held(t, native.openNetns(`/proc/self/fd/${first.fd}`));
	t.deepEqual([again.device, again.inode, again.cookie()], [first.device, first.inode, first.cookie()]);
});

test('the namespace of a socket is the one it was made in', t => {
	const netns = network(t);
	const found = held(t, native.netnsOfSocket(tcp(t, netns)));
	t.deepEqual([found.device, found.inode, found.cookie()], [netns.device, netns.inode, netns.cookie()]);
});

test('nothing of this leaves the calling thread in another namespace', t => {
	const before = readlinkSync('/proc/thread-self/ns/net');
	const netns = network(t);
	netns.addresses();
	netns.cookie();
	tcp(t, netns);
	t.is(readlinkSync('/proc/thread-self/ns/net'), before);
	t.is(`net:[${held(t, native.openNetns('/proc/self/ns/net')).inode}]`, before);
});

test('a socket talks inside its namespace only', t => {
	const netns = network(t);
	const {fd, port} = listener(t, netns);
	const client = tcp(t, netns);
	native.connect(client, sockaddr([127, 0, 0, 1], port));
	const accepted = native.accept(fd);
	t.deepEqual(native.getpeername(accepted), native.getsockname(client));
	native.closeFd(accepted);
	const stranger = tcp(t, network(t));
	const error = kernelError(t, 'ECONNREFUSED', () => {
		native.connect(stranger, sockaddr([127, 0, 0, 1], port));
	});
	t.is(error.syscall, 'connect');
	t.is(error.errno, 111);
});

test('a socket is closed on exec and keeps the type that was asked', t => {
	const netns = network(t);
	const fd = netns.socket(AF_INET, 2, 0);
	t.teardown(() => {
		native.closeFd(fd);
	});
	t.is(native.getsockopt(fd, 1, 3, 4)[0], 2);
	kernelError(t, 'EAFNOSUPPORT', () => netns.socket(9999, SOCK_STREAM, 0));
});

test('addresses tells loopback ones with their interface', t => {
	const addresses = network(t).addresses();
	const v4 = addresses.find(({family}) => family === 4)!;
	t.deepEqual({...v4, address: text(v4.address)}, {family: 4, address: '127.0.0.1', prefixLength: 8, scope: 254, interfaceIndex: 1, interfaceName: 'lo', isLoopback: true, isUp: true});
	const v6 = addresses.find(({family}) => family === 6)!;
	t.deepEqual([text(v6.address), v6.prefixLength, v6.scope], ['00000000000000000000000000000001', 128, 254]);
});

test('an interface that is down has no addresses; setUp gives it its own', t => {
	const netns = held(t, native.createNetns());
	t.deepEqual(netns.addresses(), []);
	t.deepEqual(netns.localRoutes(), []);
	netns.setUp('lo');
	t.is(netns.addresses().length, 2);
	kernelError(t, 'ENODEV', () => {
		netns.setUp('eth9');
	});
	t.throws(() => {
		netns.setUp('a-name-that-is-too-long');
	}, {instanceOf: RangeError});
});

test('localRoutes has what a packet may be delivered to, and nothing of other tables', t => {
	const netns = network(t);
	ip(t, netns, ['route add 10.5.0.0/16 dev lo', 'route add local 10.6.0.0/16 dev lo table 100', 'route add local 10.7.0.0/16 dev lo table 511', 'route add local 10.8.0.0/16 dev lo table local']);
	const routes = netns.localRoutes().map(({family, address, prefixLength, type}) => `${family} ${text(address)}/${prefixLength} ${type}`);
	t.deepEqual(routes.filter(route => route.startsWith('4')).sort(), ['4 10.8.0.0/16 2', '4 127.0.0.0/8 2', '4 127.0.0.1/32 2', '4 127.255.255.255/32 3']);
	t.true(routes.includes('6 00000000000000000000000000000001/128 2'));
});

test('1,000 addresses are all told: more than one netlink message holds', t => {
	const netns = network(t);
	ip(t, netns, Array.from({length: 1000}, (_, i) => `address add 10.9.${i >> 8}.${i & 0xff}/32 dev lo`));
	const mine = netns.addresses().filter(({address}) => address[0] === 10);
	t.is(mine.length, 1000);
	t.is(new Set(mine.map(({address}) => text(address))).size, 1000);
	t.is(netns.localRoutes().filter(({address, type}) => address[0] === 10 && type === 2).length, 1000);
});

test('the host\'s own namespace can be read', t => {
	const host = held(t, native.openNetns('/proc/self/ns/net'));
	t.true(host.cookie() > 0n);
	t.true(host.addresses().some(({isLoopback}) => isLoopback));
});

test('what is not a network namespace is EINVAL, and leaves no handle behind', t => {
	const before = native.openHandles();
	for (const path of ['/proc/self/ns/mnt', '/etc/passwd', '/dev/null', '/tmp']) {
		kernelError(t, 'EINVAL', () => native.openNetns(path));
	}

	kernelError(t, 'ENOENT', () => native.openNetns('/run/netns/nothing-here'));
	kernelError(t, 'EBADF', () => native.netnsOfSocket(1_000_000));
	t.is(native.openHandles(), before);
});

test('a closed namespace refuses everything but close, and its sockets go on', t => {
	const netns = native.createNetns();
	netns.setUp('lo');
	const {fd, port} = listener(t, netns);
	const client = tcp(t, netns);
	netns.close();
	netns.close();
	for (const act of [() => netns.fd, () => netns.cookie(), () => netns.addresses(), () => netns.localRoutes(), () => netns.socket(AF_INET6, SOCK_STREAM, 0)]) {
		kernelError(t, 'EBADF', act);
	}

	native.connect(client, sockaddr([127, 0, 0, 1], port));
	native.closeFd(native.accept(fd));
});
