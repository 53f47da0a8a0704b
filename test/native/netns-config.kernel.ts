import {spawnSync} from 'node:child_process';
import {readFileSync} from 'node:fs';
import test, {type ExecutionContext} from 'ava';
import {type BpfProgram, type NetNs, native} from '../../src/native.js';
import {AF_INET, SOCK_STREAM, fdKinds, held, kernelError, listener, loaded, network, portOf, sockaddr, tcp, u32} from './helpers.js';

const AF_INET6 = 10;
const AF_NETLINK = 16;
const SOCK_RAW = 3;
const ECONNABORTED = 103;
const ECONNRESET = 104;
const REFLECT = 'net/ipv4/fwmark_reflect';

const loopback4 = Uint8Array.of(127, 0, 0, 1);
const loopback6 = v6(1);
const mapped4 = Uint8Array.of(...new Uint8Array(10), 0xff, 0xff, ...loopback4);
const loopback = {interfaceName: 'lo'};

/** fd00:: with this last byte, and ::1 for 1. */
function v6(last: number): Uint8Array {
	return Uint8Array.of(last === 1 ? 0 : 0xfd, ...new Uint8Array(14), last);
}

/** What `ip` says in the namespace, a line each, without the blanks at their ends. */
function ip(t: ExecutionContext, netns: NetNs, ...args: string[]): string[] {
	const {status, stdout, stderr} = spawnSync('nsenter', [`--net=/proc/${process.pid}/fd/${netns.fd}`, 'ip', ...args], {encoding: 'utf8'});
	t.is(status, 0, stderr);
	return stdout.split('\n').map(line => line.trim()).filter(Boolean);
}

/** struct sockaddr_in6. */
const sockaddr6 = (address: Uint8Array, port: number): Uint8Array => Uint8Array.of(AF_INET6, 0, port >> 8, port & 0xff, 0, 0, 0, 0, ...address, 0, 0, 0, 0);

const errorOf = (fd: number): number => native.getsockopt(fd, 1, 4, 4)[0]!;

/** An established connection over loopback, to a listener that goes on. */
function connection(t: ExecutionContext, netns: NetNs, address: Uint8Array) {
	const named = (port: number) => address.length === 4 ? sockaddr([127, 0, 0, 1], port) : sockaddr6(address, port);
	const make = () => {
		const fd = netns.socket(address.length === 4 ? AF_INET : AF_INET6, SOCK_STREAM, 0);
		t.teardown(() => {
			native.closeFd(fd);
		});
		return fd;
	};

	const listening = make();
	native.bind(listening, named(0));
	native.listen(listening, 16);
	const client = make();
	const remote = portOf(native.getsockname(listening));
	native.connect(client, named(remote));
	const server = native.accept(listening);
	t.teardown(() => {
		native.closeFd(server);
	});
	return {client, server, listening, local: portOf(native.getsockname(client)), remote};
}

const iterator = (t: ExecutionContext, copies = 1): BpfProgram => held(t, loaded(t, 'small_iter', object => {
	object.setGlobals('.rodata', u32(copies));
}).program('listeners'));

const portsOf = (written: Uint8Array): number[] => [...new Uint16Array(written.buffer)].sort((a, b) => a - b);

test('interfaces has those that are down too', t => {
	const netns = network(t);
	ip(t, netns, 'link', 'add', 'a0', 'type', 'veth', 'peer', 'name', 'b0');
	netns.setUp('a0');
	t.deepEqual(netns.interfaces().map(({name, isLoopback, isUp}) => `${name} ${isLoopback} ${isUp}`).sort(), ['a0 false true', 'b0 false false', 'lo true true']);
	t.is(netns.interfaces().find(({name}) => name === 'a0')!.index, Number(ip(t, netns, '-o', 'link', 'show', 'a0')[0]!.split(':')[0]));
});

for (const family of [4, 6] as const) {
	const rule = {family, priority: 100, table: 1000, mark: 0xff00_0001, mask: 0xffff_ffff};

	test(`an IPv${family} rule comes and goes as ip rule shows it, and a second time is false`, t => {
		const netns = network(t);
		const shown = () => ip(t, netns, `-${family}`, 'rule').filter(line => line.includes('fwmark'));
		const before = netns.rules();
		const masked = {family, priority: 0xffff_fffe, table: 100, mark: 0x10, mask: 0xf0};
		t.true(netns.changeRule('add', rule));
		t.true(netns.changeRule('add', masked));
		t.false(netns.changeRule('add', rule));
		t.deepEqual(shown(), ['100:\tfrom all fwmark 0xff000001 lookup 1000', '4294967294:\tfrom all fwmark 0x10/0xf0 lookup 100']);
		t.deepEqual(netns.rules().filter(({mark}) => mark !== 0), [rule, masked]);
		t.true(netns.changeRule('delete', rule));
		t.false(netns.changeRule('delete', rule));
		t.true(netns.changeRule('delete', masked));
		t.deepEqual([shown(), netns.rules()], [[], before]);
	});

	test(`an IPv${family} rule that ip made is the same one`, t => {
		const netns = network(t);
		ip(t, netns, `-${family}`, 'rule', 'add', 'fwmark', '0xff000001', 'pref', '100', 'lookup', '1000');
		t.false(netns.changeRule('add', rule));
		t.true(netns.changeRule('delete', rule));
	});

	test(`a delete takes no IPv${family} rule of another mark, mask, table or priority`, t => {
		const netns = network(t);
		netns.changeRule('add', rule);
		for (const other of [{mark: 2}, {mask: 0xff}, {table: 1001}, {priority: 101}]) {
			t.false(netns.changeRule('delete', {...rule, ...other}));
		}

		t.deepEqual(netns.rules().filter(({mark}) => mark !== 0), [rule]);
	});

	test(`an IPv${family} local route comes and goes as ip route shows it, and a second time is false`, t => {
		const netns = network(t);
		const shown = (table: number) => ip(t, netns, `-${family}`, 'route', 'show', 'table', String(table)).map(line => line.split(' ').slice(0, 4).join(' '));
		const everything = {address: new Uint8Array(family === 4 ? 4 : 16), prefixLength: 0, table: 100, ...loopback};
		const some = family === 4 ? {address: Uint8Array.of(10, 5, 0, 0), prefixLength: 16, table: 1000, ...loopback} : {address: v6(9), prefixLength: 128, table: 1000, ...loopback};
		const before = netns.routes();
		for (const route of [everything, some]) {
			t.true(netns.changeLocalRoute('add', route));
			t.false(netns.changeLocalRoute('add', route));
		}

		t.deepEqual([shown(100), shown(1000)], [['local default dev lo'], [`local ${family === 4 ? '10.5.0.0/16' : 'fd00::9'} dev lo`]]);
		t.deepEqual(netns.routes().filter(({table}) => table === 100 || table === 1000), [everything, some].map(({address, prefixLength, table}) =>
			({family, table, type: 2, address, prefixLength, interfaceIndex: 1, metric: family === 4 ? 0 : 1024})));
		for (const route of [everything, some]) {
			t.true(netns.changeLocalRoute('delete', route));
			t.false(netns.changeLocalRoute('delete', route));
		}

		t.false(netns.changeLocalRoute('delete', {...some, table: 77}));
		t.deepEqual(netns.routes(), before);
	});

	test(`an IPv${family} address comes and goes as ip address shows it, and a second time is false`, t => {
		const netns = network(t);
		const shown = () => ip(t, netns, `-${family}`, '-o', 'address', 'show', 'scope', 'global').map(line => line.split(/\s+/)[3]);
		const address = family === 4 ? {address: Uint8Array.of(10, 1, 2, 3), prefixLength: 24, ...loopback} : {address: v6(9), prefixLength: 64, ...loopback};
		t.true(netns.changeAddress('add', address));
		t.false(netns.changeAddress('add', address));
		t.deepEqual(shown(), [family === 4 ? '10.1.2.3/24' : 'fd00::9/64']);
		t.true(netns.changeAddress('delete', address));
		t.false(netns.changeAddress('delete', address));
		t.deepEqual(shown(), []);
	});
}

test('an IPv6 address is usable at once, and one of 127/8 has scope host', t => {
	const netns = network(t);
	ip(t, netns, 'link', 'add', 'a0', 'type', 'veth', 'peer', 'name', 'b0');
	netns.setUp('a0');
	netns.setUp('b0');
	netns.changeAddress('add', {address: v6(9), prefixLength: 64, interfaceName: 'a0'});
	const fd = netns.socket(AF_INET6, SOCK_STREAM, 0);
	t.teardown(() => {
		native.closeFd(fd);
	});
	// Tentative, as duplicate address detection leaves it for a second, it would be EADDRNOTAVAIL.
	t.notThrows(() => {
		native.bind(fd, sockaddr6(v6(9), 0));
	});
	netns.changeAddress('add', {address: Uint8Array.of(127, 0, 0, 6), prefixLength: 32, ...loopback});
	t.is(netns.addresses().find(({address}) => address[0] === 127 && address[3] === 6)!.scope, 254);
});

test('routes tells tables, types, metrics and the first of several next hops', t => {
	const netns = network(t);
	for (const command of ['link add a0 type veth peer name b0', 'link set a0 up', 'link set b0 up', 'address add 10.1.0.1/24 dev a0', 'address add 10.2.0.1/24 dev b0',
		'route add blackhole 10.9.0.0/16 metric 7', 'route add 10.8.0.0/16 table 300 nexthop via 10.2.0.9 nexthop via 10.1.0.9']) {
		ip(t, netns, ...command.split(' '));
	}

	const b0 = netns.interfaces().find(({name}) => name === 'b0')!.index;
	const route = (second: number) => netns.routes().find(({address, prefixLength}) => address[0] === 10 && address[1] === second && prefixLength === 16);
	t.deepEqual(route(9), {family: 4, table: 254, type: 6, address: Uint8Array.of(10, 9, 0, 0), prefixLength: 16, interfaceIndex: 0, metric: 7});
	t.deepEqual(route(8), {family: 4, table: 300, type: 1, address: Uint8Array.of(10, 8, 0, 0), prefixLength: 16, interfaceIndex: b0, metric: 0});
});

test('a rule that looks no table up has table 0', t => {
	const netns = network(t);
	ip(t, netns, 'rule', 'add', 'blackhole', 'from', '10.0.0.0/8', 'pref', '7', 'table', '5');
	t.deepEqual(netns.rules().find(({priority}) => priority === 7), {family: 4, priority: 7, table: 0, mark: 0, mask: 0});
});

test('a sysctl is that of the namespace, and not the host\'s', t => {
	const netns = network(t);
	const host = readFileSync(`/proc/sys/${REFLECT}`, 'utf8').trim();
	const other = host === '1' ? '0' : '1';
	netns.setSysctl('/proc', REFLECT, other);
	t.deepEqual(netns.sysctls('/proc', [REFLECT, 'net/ipv4/ip_local_port_range']), [other, '32768\t60999']);
	t.is(readFileSync(`/proc/sys/${REFLECT}`, 'utf8').trim(), host);
	t.deepEqual(network(t).sysctls('/proc', [REFLECT]), ['0']);
});

test('the iterator sees the sockets of its namespace only', t => {
	const program = iterator(t);
	const [first, second] = [network(t), network(t)];
	t.deepEqual(first.runIterator(program), new Uint8Array(0));
	const ports = [listener(t, first).port, listener(t, first).port].sort((a, b) => a - b);
	const {remote} = connection(t, second, loopback6);
	t.deepEqual(portsOf(first.runIterator(program)), ports);
	t.deepEqual(portsOf(second.runIterator(program)), [remote]);
});

test('an answer of 320 KB comes whole, and more than 32 KiB of one socket is E2BIG', t => {
	const netns = network(t);
	const ports = Array.from({length: 20}, () => listener(t, netns).port).sort((a, b) => a - b);
	const counts = new Map<number, number>();
	for (const port of portsOf(netns.runIterator(iterator(t, 8000)))) {
		counts.set(port, (counts.get(port) ?? 0) + 1);
	}

	t.deepEqual([...counts], ports.map(port => [port, 8000] as [number, number]));
	t.is(kernelError(t, 'E2BIG', () => netns.runIterator(iterator(t, 20_000))).syscall, 'read');
});

for (const [title, address, asked] of [
	['IPv4', loopback4, loopback4],
	['IPv6', loopback6, loopback6],
	['IPv4-mapped', mapped4, mapped4],
	['IPv4-mapped, asked for by 4 bytes', mapped4, loopback4],
	['IPv4, asked for by the mapped address', loopback4, mapped4],
] as const) {
	test(`destroying a connection, ${title}: both ends see it, once`, t => {
		const netns = network(t);
		const {client, server, local, remote} = connection(t, netns, address);
		const bystander = connection(t, netns, address);
		const destroy = () => netns.destroyTcpSocket({address: asked, port: local}, {address: asked, port: remote});
		t.true(destroy());
		t.deepEqual([errorOf(client), errorOf(server)], [ECONNABORTED, ECONNRESET]);
		t.deepEqual([errorOf(bystander.client), errorOf(bystander.server)], [0, 0]);
		t.false(destroy());
	});
}

test('of a connection within one host, the end that is named gets it', t => {
	const netns = network(t);
	const {client, server, local, remote} = connection(t, netns, loopback4);
	t.true(netns.destroyTcpSocket({address: loopback4, port: remote}, {address: loopback4, port: local}));
	t.deepEqual([errorOf(client), errorOf(server)], [ECONNRESET, ECONNABORTED]);
});

test('where no such connection is, destroying is false, and the listener goes on', t => {
	const netns = network(t);
	const {client, server, listening, local, remote} = connection(t, netns, loopback4);
	const end = (port: number, address: Uint8Array = loopback4) => ({address, port});
	for (const [from, to] of [[remote, 1], [remote, 0], [remote, remote], [1, remote], [1, 2]] as const) {
		t.false(netns.destroyTcpSocket(end(from), end(to)), `${from} to ${to}`);
	}

	t.false(netns.destroyTcpSocket(end(remote, new Uint8Array(4)), end(0, new Uint8Array(4))));
	t.false(netns.destroyTcpSocket(end(local, loopback6), end(remote, loopback6)));
	t.false(network(t).destroyTcpSocket(end(local), end(remote)));
	t.deepEqual([errorOf(client), errorOf(server), errorOf(listening)], [0, 0, 0]);
	native.connect(tcp(t, netns), sockaddr([127, 0, 0, 1], remote));
	native.closeFd(native.accept(listening));
});

test('TIME_WAIT is no connection to destroy', t => {
	const netns = network(t);
	const {fd, port} = listener(t, netns);
	const client = netns.socket(AF_INET, SOCK_STREAM, 0);
	native.connect(client, sockaddr([127, 0, 0, 1], port));
	const local = portOf(native.getsockname(client));
	const server = native.accept(fd);
	native.closeFd(client);
	native.closeFd(server);
	const timeWait = () => spawnSync('nsenter', [`--net=/proc/${process.pid}/fd/${netns.fd}`, 'ss', '-Htn', 'state', 'time-wait'], {encoding: 'utf8'}).stdout;
	t.regex(timeWait(), new RegExp(`:${local}\\s`));
	t.false(netns.destroyTcpSocket({address: loopback4, port: local}, {address: loopback4, port}));
	t.regex(timeWait(), new RegExp(`:${local}\\s`));
});

test('wrong arguments are refused before any system call', t => {
	// Closed, it would say EBADF to the first one.
	const netns = native.createNetns();
	netns.close();
	const rule = {family: 4, priority: 1, table: 1, mark: 1, mask: 1} as const;
	const route = {address: loopback4, prefixLength: 32, table: 1, ...loopback};
	const end = {address: loopback4, port: 1};
	const refused = (expected: typeof RangeError | typeof TypeError, acts: ReadonlyArray<() => unknown>) => {
		for (const act of acts) {
			t.throws(act, {instanceOf: expected}, String(act));
		}
	};

	refused(RangeError, [
		() => netns.changeRule('change' as 'add', rule),
		...[{family: 5 as 4}, {priority: -1}, {priority: 2 ** 32}, {table: 0}, {mark: 0}, {mask: 0}, {mark: 1.5}].map(wrong => () => netns.changeRule('delete', {...rule, ...wrong})),
		...[{address: new Uint8Array(5)}, {prefixLength: 33}, {interfaceName: ''}, {interfaceName: 'sixteen-bytes-16'}, {table: 0}].map(wrong => () => netns.changeLocalRoute('add', {...route, ...wrong})),
		() => netns.changeAddress('add', {...route, address: loopback6, prefixLength: 129}),
		() => netns.destroyTcpSocket(end, {...end, port: 65_536}),
		() => netns.destroyTcpSocket(end, {...end, address: loopback6}),
		...['', '/etc/passwd', '..', '../1/environ', 'net/../../1/environ', 'net/..'].map(name => () => netns.sysctls('/proc', [name])),
		() => netns.setSysctl('/proc', 'net/../kernel/hostname', 'x'),
		() => netns.setSysctl('/proc', REFLECT, ''),
	]);
	refused(TypeError, [
		() => netns.changeRule(1 as unknown as 'add', rule),
		() => netns.changeRule('add', undefined as unknown as typeof rule),
		() => netns.changeLocalRoute('add', {...route, address: '127.0.0.1' as unknown as Uint8Array}),
		() => netns.changeAddress('add', {...route, interfaceName: 1 as unknown as string}),
		() => netns.setSysctl('/proc', REFLECT, 1 as unknown as string),
		() => netns.sysctls('/proc', REFLECT as unknown as string[]),
		() => netns.sysctls('/proc', [1 as unknown as string]),
		() => netns.runIterator({} as BpfProgram),
		() => netns.destroyTcpSocket(end, 1 as unknown as typeof end),
	]);
});

test('what the kernel refuses says so, and leaves no fd and no handle behind', t => {
	const netns = network(t);
	const program = iterator(t);
	const large = iterator(t, 20_000);
	const stranger = held(t, loaded(t, 'small').program('count'));
	listener(t, netns);
	const closed = native.createNetns();
	closed.close();
	const end = {address: loopback4, port: 1};
	const rule = {family: 4, priority: 1, table: 1, mark: 1, mask: 1} as const;
	const route = {address: loopback4, prefixLength: 32, table: 1, ...loopback};
	const state = () => ({fds: fdKinds(), handles: native.openHandles()});
	netns.cookie();
	const before = state();
	for (const [code, act] of [
		['ENODEV', () => netns.changeLocalRoute('add', {...route, interfaceName: 'eth9'})],
		['ENODEV', () => netns.changeAddress('delete', {...route, interfaceName: 'eth9'})],
		['EINVAL', () => netns.changeLocalRoute('add', {...route, prefixLength: 8})],
		['ENOENT', () => netns.sysctls('/proc', ['net/ipv4/nothing_here'])],
		['ENOENT', () => netns.sysctls('/nowhere', [REFLECT])],
		['ENOENT', () => netns.sysctls('/proc', [REFLECT, 'net/ipv4/nothing_here'])],
		['EISDIR', () => netns.sysctls('/proc', ['net'])],
		['EINVAL', () => {
			netns.setSysctl('/proc', REFLECT, 'many');
		}],
		['EINVAL', () => netns.runIterator(stranger)],
		['E2BIG', () => netns.runIterator(large)],
		...[() => closed.interfaces(), () => closed.routes(), () => closed.rules(), () => closed.changeRule('add', rule), () => closed.changeLocalRoute('add', route), () => closed.changeAddress('add', route),
			() => closed.sysctls('/proc', [REFLECT]), () => closed.runIterator(program), () => closed.destroyTcpSocket(end, end)].map(act => ['EBADF', act] as const),
	] as ReadonlyArray<readonly [string, () => unknown]>) {
		kernelError(t, code, act);
	}

	t.deepEqual(state(), before);
});

test('nor does what succeeds, but for one socket that goes with the namespace', t => {
	const program = iterator(t);
	const before = fdKinds();
	const netns = network(t);
	const opened = fdKinds();
	netns.cookie();
	const one = fdKinds();
	t.is(one['socket'], (opened['socket'] ?? 0) + 1);
	netns.interfaces();
	netns.routes();
	netns.rules();
	netns.sysctls('/proc', [REFLECT]);
	netns.setSysctl('/proc', REFLECT, '1');
	netns.runIterator(program);
	netns.destroyTcpSocket({address: loopback4, port: 1}, {address: loopback4, port: 2});
	netns.changeRule('add', {family: 4, priority: 1, table: 1, mark: 1, mask: 1});
	t.deepEqual(fdKinds(), one);
	netns.close();
	t.deepEqual(fdKinds(), before);
});

test('a stranger inside who fills that socket is told of once, and out of the way then', t => {
	const netns = network(t);
	netns.rules();
	const stranger = netns.socket(AF_NETLINK, SOCK_RAW, 0);
	t.teardown(() => {
		native.closeFd(stranger);
	});
	// The first netlink socket of a process in a namespace has the process' id for a port.
	native.connect(stranger, Uint8Array.of(AF_NETLINK, 0, 0, 0, ...u32(process.pid), 0, 0, 0, 0));
	const junk = new Uint8Array(16);
	for (let sent = 0; sent < 1000; sent++) {
		try {
			native.send(stranger, junk);
		} catch {
			break;
		}
	}

	const rule = {family: 4, priority: 1, table: 1, mark: 1, mask: 1} as const;
	kernelError(t, 'ENOBUFS', () => netns.changeRule('add', rule));
	t.false(netns.changeRule('add', rule), 'it was heard the first time');
	t.true(netns.rules().some(({priority}) => priority === 1));
});
