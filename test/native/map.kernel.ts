import test from 'ava';
import {native} from '../../src/native.js';
import {bpffs, held, kernelError, listener, loaded, mapOf, network, opened, readU32, readU64, u32, u64} from './helpers.js';

const kinds = (t: Parameters<typeof opened>[0], name: string) => mapOf(t, loaded(t, 'small_kinds'), name);

test('a hash gives back what it was given, and undefined for an absent key', t => {
	const map = kinds(t, 'hash');
	t.is(map.lookup(u32(1)), undefined);
	map.update(u32(1), u64(11n));
	t.deepEqual(map.lookup(u32(1)), u64(11n));
	t.true(map.delete(u32(1)));
	t.false(map.delete(u32(1)));
	t.is(map.lookup(u32(1)), undefined);
});

test('update flags are the kernel\'s: NOEXIST and EXIST', t => {
	const map = kinds(t, 'hash');
	kernelError(t, 'ENOENT', () => {
		map.update(u32(1), u64(1n), 2);
	});
	map.update(u32(1), u64(1n), 1);
	kernelError(t, 'EEXIST', () => {
		map.update(u32(1), u64(2n), 1);
	});
	map.update(u32(1), u64(3n), 2);
	t.deepEqual(map.lookup(u32(1)), u64(3n));
});

test('info tells the shape that the kernel has', t => {
	const {id, ...info} = kinds(t, 'hash').info();
	t.true(id > 0);
	t.true(info.btfId > 0);
	t.deepEqual({...info, btfId: 0}, {name: 'hash', type: 1, keySize: 4, valueSize: 8, maxEntries: 65_536, flags: 1, lookupSize: 8, btfId: 0});
});

test('an array has all its entries from the start and loses none', t => {
	const map = kinds(t, 'array');
	map.update(u32(2), u32(7));
	t.deepEqual(map.entries(), {count: 3, keys: u32(0, 1, 2), values: u32(0, 0, 7)});
	t.is(map.count(), 3);
	kernelError(t, 'EINVAL', () => map.delete(u32(0)));
	kernelError(t, 'E2BIG', () => {
		map.update(u32(3), u32(1));
	});
	t.is(map.lookup(u32(3)), undefined);
});

test('a per-CPU value has an 8-byte slot for every possible CPU', t => {
	const map = kinds(t, 'percpu');
	const cpus = native.possibleCpus();
	t.is(map.info().valueSize, 4);
	t.is(map.info().lookupSize, 8 * cpus);
	const value = u64(...Array.from({length: cpus}, (_, cpu) => BigInt(cpu + 1)));
	map.update(u32(5), value);
	t.deepEqual(map.lookup(u32(5)), value);
	t.deepEqual(map.entries(), {count: 1, keys: u32(5), values: value});
	t.throws(() => {
		map.update(u32(5), u32(1));
	}, {instanceOf: RangeError});
});

test('a trie answers with the longest prefix and lists the ones it holds', t => {
	const map = kinds(t, 'trie');
	const prefix = (bits: number, ...address: number[]) => Uint8Array.of(bits, 0, 0, 0, ...address);
	map.update(prefix(8, 10, 0, 0, 0), u32(1));
	map.update(prefix(24, 10, 1, 2, 0), u32(2));
	t.deepEqual(map.lookup(prefix(32, 10, 1, 2, 3)), u32(2));
	t.deepEqual(map.lookup(prefix(32, 10, 9, 9, 9)), u32(1));
	t.is(map.lookup(prefix(32, 11, 0, 0, 1)), undefined);
	const {count, keys} = map.entries();
	t.is(count, 2);
	t.is(map.count(), 2);
	t.deepEqual([keys.slice(0, 8), keys.slice(8)].sort((a, b) => a[0]! - b[0]!), [prefix(8, 10, 0, 0, 0), prefix(24, 10, 1, 2, 0)]);
});

test('20,000 prefixes come back once each', t => {
	const map = kinds(t, 'trie');
	for (let i = 0; i < 20_000; i++) {
		map.update(Uint8Array.of(32, 0, 0, 0, 10, i >> 16, i >> 8, i), u32(i));
	}

	const {count, values} = map.entries();
	t.is(count, 20_000);
	t.is(new Set(new Uint32Array(values.buffer, values.byteOffset, count)).size, 20_000);
	t.is(map.count(), 20_000);
});

test('a sockhash holds a listening socket, by its fd, and shows its cookie', t => {
	const map = kinds(t, 'sockets');
	const {fd} = listener(t, network(t));
	map.update(u32(0), u64(BigInt(fd)));
	const cookie = native.getsockopt(fd, 1, 57, 8);
	t.deepEqual(map.lookup(u32(0)), cookie);
	t.is(map.info().btfId, 0);
	t.deepEqual(map.entries(), {count: 1, keys: u32(0), values: cookie});
	t.true(map.delete(u32(0)));
	t.is(map.count(), 0);
});

test('socket storage is read and written through the socket\'s fd', t => {
	const map = kinds(t, 'storage');
	const {fd} = listener(t, network(t));
	t.is(map.lookup(u32(fd)), undefined);
	map.update(u32(fd), u64(99n));
	t.deepEqual(map.lookup(u32(fd)), u64(99n));
	t.true(map.delete(u32(fd)));
	t.deepEqual(map.entries(), {count: 0, keys: new Uint8Array(), values: new Uint8Array()});
	t.is(map.count(), 0);
});

test('a ring buffer has no keys to walk', t => {
	const map = kinds(t, 'ring');
	t.is(map.count(), 0);
	t.is(map.entries().count, 0);
});

test('65,536 entries come back in one call, each once', t => {
	const map = kinds(t, 'hash');
	for (let key = 0; key < 65_536; key++) {
		map.update(u32(key), u64(BigInt(key) * 3n));
	}

	const started = performance.now();
	const {count, keys, values} = map.entries();
	t.log(`65,536 entries in ${(performance.now() - started).toFixed(1)} ms`);
	t.is(count, 65_536);
	const seen = new Set<number>();
	for (let i = 0; i < count; i++) {
		const key = readU32(keys, i);
		seen.add(key);
		if (readU64(values, i) !== BigInt(key) * 3n) {
			t.fail(`value of key ${key}`);
		}
	}

	t.is(seen.size, 65_536);
	t.is(map.count(), 65_536);
});

test('nextKey walks every key and ends', t => {
	const map = kinds(t, 'hash');
	t.is(map.nextKey(), undefined);
	for (const key of [3, 1, 2]) {
		map.update(u32(key), u64(0n));
	}

	const seen = [];
	for (let key = map.nextKey(); key; key = map.nextKey(key)) {
		seen.push(readU32(key));
	}

	t.deepEqual(seen.sort(), [1, 2, 3]);
});

test('keys and values of the wrong size or type are refused before the kernel sees them', t => {
	const map = kinds(t, 'hash');
	for (const act of [
		() => map.lookup(new Uint8Array(3)),
		() => map.lookup(new Uint8Array(5)),
		() => map.delete(new Uint8Array()),
		() => map.nextKey(new Uint8Array(8)),
		() => {
			map.update(u32(1), u32(1));
		},
		() => {
			map.update(u32(1), u64(1n, 2n));
		},
		() => {
			map.update(u32(1), u64(1n), -1);
		},
		() => {
			map.update(u32(1), u64(1n), 0.5);
		},
	]) {
		t.throws(act, {instanceOf: RangeError});
	}

	for (const wrong of [undefined, null, 'abcd', [1, 2, 3, 4], new ArrayBuffer(4), new Uint32Array(1), {}, 4]) {
		t.throws(() => map.lookup(wrong as never), {instanceOf: TypeError});
	}

	t.is(map.count(), 0);
});

test('a key may be a view into the middle of a larger buffer', t => {
	const map = kinds(t, 'hash');
	const large = u32(1, 2, 3);
	map.update(large.subarray(4, 8), u64(22n));
	t.deepEqual(map.lookup(u32(2)), u64(22n));
});

test('a method on another receiver throws and does not crash', t => {
	const map = kinds(t, 'hash');
	const program = held(t, loaded(t, 'small').program('count'));
	for (const receiver of [{}, program, undefined, 3]) {
		t.throws(() => map.lookup.call(receiver as never, u32(1)), {instanceOf: TypeError});
	}
});

test('a pinned map is found by its path, and once more by its id', t => {
	const map = kinds(t, 'hash');
	const pin = `${bpffs(t)}/hash`;
	map.update(u32(1), u64(5n));
	map.pin(pin);
	kernelError(t, 'EEXIST', () => {
		map.pin(pin);
	});
	const {id} = map.info();
	map.close();
	const again = held(t, native.openPinnedMap(pin));
	t.is(again.info().id, id);
	t.deepEqual(again.lookup(u32(1)), u64(5n));
	const byId = held(t, native.openMapById(id));
	t.deepEqual(byId.lookup(u32(1)), u64(5n));
	t.true(native.ids('map').includes(id));
});

test('a path without a pin, and a pin off a bpffs, are told by the kernel\'s word', t => {
	const error = kernelError(t, 'ENOENT', () => native.openPinnedMap('/sys/fs/nothing'));
	t.is(error.message, 'bpf(BPF_OBJ_GET) /sys/fs/nothing: ENOENT: no such file or directory');
	t.is(error.errno, 2);
	t.is(error.syscall, 'bpf(BPF_OBJ_GET)');
	t.is(error.subject, '/sys/fs/nothing');
	kernelError(t, 'EPERM', () => {
		kinds(t, 'hash').pin('/tmp/not-a-bpffs');
	});
	kernelError(t, 'ENOENT', () => native.openMapById(0xff_ff_ff_fe));
});

test('a pin of another kind is refused, not misread', t => {
	const object = loaded(t, 'small');
	const directory = bpffs(t);
	held(t, object.program('count')).pin(`${directory}/program`);
	mapOf(t, object, 'runs').pin(`${directory}/map`);
	const before = native.openHandles();
	kernelError(t, 'EINVAL', () => native.openPinnedMap(`${directory}/program`));
	kernelError(t, 'EINVAL', () => native.openPinnedLink(`${directory}/program`));
	kernelError(t, 'EINVAL', () => native.openPinnedProgram(`${directory}/map`));
	t.is(native.openHandles(), before);
});

test('a closed map refuses everything but close', t => {
	const map = kinds(t, 'hash');
	map.close();
	map.close();
	for (const act of [() => map.fd, () => map.info(), () => map.lookup(u32(1)), () => map.nextKey(), () => map.entries(), () => map.count()]) {
		kernelError(t, 'EBADF', act);
	}
});
