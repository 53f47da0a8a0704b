import test from 'ava';
import {native} from '../../src/native.js';
import {AF_INET, SOCK_STREAM, bpffs, cgroup, held, kernelError, listener, loaded, mapOf, network, readU64, u32, u64} from './helpers.js';

/** struct bpf_sk_lookup (linux/bpf.h): 72 bytes, ports as each field has them. */
function lookupContext(localPort: number): Uint8Array {
	const context = new Uint8Array(72);
	const view = new DataView(context.buffer);
	view.setUint32(8, AF_INET, true);
	view.setUint32(12, 6, true);
	view.setUint32(60, localPort, true);
	return context;
}

test('info tells id, name, tag, load time and maps', t => {
	const object = loaded(t, 'small');
	const program = held(t, object.program('count'));
	const info = program.info();
	t.is(info.name, 'count');
	t.is(info.type, 1);
	t.regex(info.tag, /^[\da-f]{16}$/);
	t.true(info.loadedAtNs > 0n);
	t.true(info.mapIds.includes(mapOf(t, object, 'runs').info().id));
	const again = held(t, native.openProgramById(info.id));
	t.deepEqual(again.info(), info);
	t.true(native.ids('program').includes(info.id));
});

test('testRun gives what the program returned, as often as asked', t => {
	const object = loaded(t, 'small');
	const result = held(t, object.program('count')).testRun({data: new Uint8Array(64), repeat: 1000});
	t.is(result.returnValue, 42);
	t.is(result.data.length, 64);
	t.deepEqual(mapOf(t, object, 'runs').lookup(u32(0)), u64(1000n));
});

test('testRun of sk_lookup answers with the cookie of the socket that it chose', t => {
	const object = loaded(t, 'small_kinds', object => {
		object.setGlobals('.rodata', u32(15_008));
	});
	const steer = held(t, object.program('steer'));
	const {fd} = listener(t, network(t));
	t.is(steer.testRun({context: lookupContext(80)}).returnValue, 1);
	t.is(steer.testRun({context: lookupContext(15_008)}).returnValue, 0);
	mapOf(t, object, 'sockets').update(u32(0), u64(BigInt(fd)));
	const chosen = steer.testRun({context: lookupContext(15_008)});
	t.is(chosen.returnValue, 1);
	t.is(chosen.context.length, 72);
	t.is(readU64(chosen.context), readU64(native.getsockopt(fd, 1, 57, 8)));
});

test('testRun of a type that has none is ENOTSUPP, 524', t => {
	const allow = held(t, loaded(t, 'small_kinds').program('allow'));
	const error = kernelError(t, 'ENOTSUPP', () => allow.testRun({context: new Uint8Array(72)}));
	t.is(error.errno, 524);
	t.regex(error.message, /^bpf\(BPF_PROG_TEST_RUN\) program allow: ENOTSUPP: /);
});

test('testRun refuses arguments of the wrong type', t => {
	const count = held(t, loaded(t, 'small').program('count'));
	t.throws(() => count.testRun(undefined as never), {instanceOf: TypeError});
	t.throws(() => count.testRun({data: 'x'} as never), {instanceOf: TypeError});
	t.throws(() => count.testRun({data: new Uint8Array(14), repeat: 0}), {instanceOf: RangeError});
});

test('run statistics count while their fd is open', t => {
	const count = held(t, loaded(t, 'small').program('count'));
	const stats = native.enableStats();
	try {
		count.testRun({data: new Uint8Array(14), repeat: 10});
		t.true(count.info().runCount >= 0n);
	} finally {
		native.closeFd(stats);
	}

	kernelError(t, 'EBADF', () => {
		native.closeFd(stats);
	});
});

test('a program pinned is found again, without its attach type', t => {
	const allow = held(t, loaded(t, 'small_kinds').program('allow'));
	const pin = `${bpffs(t)}/allow`;
	allow.pin(pin);
	const again = held(t, native.openPinnedProgram(pin));
	t.is(again.info().id, allow.info().id);
	const directory = cgroup(t);
	t.throws(() => again.attachCgroup(directory), {instanceOf: TypeError, message: /attachType/});
	held(t, again.attachCgroup(directory, 10)).close();
});

test('sk_lookup steers a port nobody listens on to the socket in the map, only in its namespace', t => {
	const object = loaded(t, 'small_kinds', object => {
		object.setGlobals('.rodata', u32(15_008));
	});
	const netns = network(t);
	const {fd} = listener(t, netns);
	const steer = held(t, object.program('steer'));
	const link = held(t, steer.attachNetns(netns.fd));
	t.is(link.info().targetId, netns.inode);
	t.is(link.info().type, 5);
	mapOf(t, object, 'sockets').update(u32(0), u64(BigInt(fd)));

	const dial = (into: typeof netns) => {
		const client = into.socket(AF_INET, SOCK_STREAM, 0);
		try {
			native.connect(client, Uint8Array.of(AF_INET, 0, 15_008 >> 8, 15_008 & 0xff, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0));
		} finally {
			native.closeFd(client);
		}
	};

	dial(netns);
	native.closeFd(native.accept(fd));
	kernelError(t, 'ECONNREFUSED', () => {
		dial(network(t));
	});
	link.close();
	kernelError(t, 'ECONNREFUSED', () => {
		dial(netns);
	});
});

test('sk_msg attaches to a sockhash by a link, and detaches with it', t => {
	const object = loaded(t, 'small_kinds');
	const sockets = mapOf(t, object, 'sockets');
	const pass = held(t, object.program('pass'));
	const link = held(t, pass.attachMap(sockets));
	t.deepEqual({...link.info(), id: 0}, {id: 0, type: 14, programId: pass.info().id, attachType: 7, targetId: BigInt(sockets.info().id)});
	kernelError(t, 'EBUSY', () => pass.attachMap(sockets));
	link.close();
	pass.attachMap(sockets).close();
	pass.attachMapLegacy(sockets);
	pass.detachMap(sockets);
	t.throws(() => pass.attachMap({} as never), {instanceOf: TypeError});
});

test('a closed program refuses everything but close', t => {
	const count = loaded(t, 'small').program('count');
	count.close();
	count.close();
	for (const act of [() => count.fd, () => count.info(), () => count.testRun({data: new Uint8Array(14)}), () => count.attachCgroup('/sys/fs/cgroup')]) {
		kernelError(t, 'EBADF', act);
	}
});
