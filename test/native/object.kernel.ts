import {fstatSync, readFileSync} from 'node:fs';
import test from 'ava';
import {native} from '../../src/native.js';
import {bpffs, fixture, held, kernelError, loaded, mapOf, opened, readU32, u32, u64} from './helpers.js';

const ethernet = new Uint8Array(14);

test('an object opens from a path and from bytes alike', t => {
	const fromPath = opened(t, 'small');
	const fromBytes = held(t, native.openObject(readFileSync(fixture('small')), 'small'));
	t.deepEqual(fromBytes.maps(), fromPath.maps());
	t.deepEqual(fromBytes.programs(), fromPath.programs());
	t.deepEqual(fromBytes.btf(), fromPath.btf());
	t.deepEqual(fromPath.maps(), [{name: 'runs', type: 2, keySize: 4, valueSize: 8, maxEntries: 4, flags: 0}]);
	t.deepEqual(fromPath.programs(), [{name: 'count', section: 'socket', type: 1, attachType: 0}]);
	t.deepEqual([...fromPath.btf().subarray(0, 2)], [0x9f, 0xeb]);

	fromBytes.load();
	t.is(held(t, fromBytes.program('count')).testRun({data: ethernet}).returnValue, 42);
});

test('the bytes may change or vanish once the object is open', t => {
	const bytes = Uint8Array.from(readFileSync(fixture('small')));
	const object = held(t, native.openObject(bytes, 'small'));
	bytes.fill(0xff);
	object.load();
	t.is(held(t, object.program('count')).testRun({data: ethernet}).returnValue, 42);
});

test('a constant that is set before load is what the program sees', t => {
	const object = opened(t, 'small');
	t.is(readU32(object.globals('.rodata')), 42);
	object.setGlobals('.rodata', u32(7));
	t.is(readU32(object.globals('.rodata')), 7);
	object.load();
	t.is(held(t, object.program('count')).testRun({data: ethernet}).returnValue, 7);
});

test('globals of another size are refused', t => {
	const object = opened(t, 'small');
	t.throws(() => {
		object.setGlobals('.rodata', new Uint8Array(3));
	}, {instanceOf: RangeError, message: /4 bytes, got 3/});
	kernelError(t, 'ENOENT', () => object.globals('.nothing'));
});

test('settings are refused after load, handles before it', t => {
	const object = opened(t, 'small');
	kernelError(t, 'EBUSY', () => object.map('runs'));
	object.load();
	for (const act of [
		() => {
			object.setGlobals('.rodata', u32(7));
		},
		() => {
			object.setMaxEntries('runs', 8);
		},
		() => {
			object.setAutoload('count', false);
		},
		() => {
			object.load();
		},
	]) {
		kernelError(t, 'EBUSY', act);
	}

	kernelError(t, 'ENOENT', () => object.map('nothing'));
	kernelError(t, 'ENOENT', () => object.program('nothing'));
});

test('setMaxEntries is the size that the kernel makes', t => {
	const object = loaded(t, 'small', object => {
		object.setMaxEntries('runs', 9);
	});
	t.is(mapOf(t, object, 'runs').info().maxEntries, 9);
});

test('a refusal names the program and carries errno and the verifier\'s log, and prints nothing', t => {
	const object = opened(t, 'small_refused');
	const error = kernelError(t, 'EACCES', () => {
		object.load();
	});
	t.is(error.errno, 13);
	t.is(error.syscall, 'bpf(BPF_PROG_LOAD)');
	t.regex(error.subject, /program unchecked$/);
	t.regex(error.log!, /invalid mem access 'map_value_or_null'/);
	t.regex(error.message, /^bpf\(BPF_PROG_LOAD\) .*: EACCES: permission denied$/);
});

test('a program with autoload off is left out, and the others load', t => {
	const object = loaded(t, 'small_refused', object => {
		object.setAutoload('unchecked', false);
	});
	t.is(held(t, object.program('fine')).info().name, 'fine');
	kernelError(t, 'ENOENT', () => object.program('unchecked'));
});

test('a map that cannot be made is named', t => {
	const object = opened(t, 'small_kinds');
	object.setMaxEntries('ring', 4097);
	// Libbpf rounds a ring up to pages; 2^31 of them is more than the kernel takes.
	object.setMaxEntries('hash', 0xff_ff_ff_ff);
	const error = t.throws(() => {
		object.load();
	});
	t.regex(error!.message, /bpf\(BPF_MAP_CREATE\) .* map hash: E/);
});

test('an object that reuses a map shares it', t => {
	const first = loaded(t, 'small');
	const runs = mapOf(t, first, 'runs');
	const second = loaded(t, 'small', object => {
		object.reuseMap('runs', runs);
	});
	held(t, second.program('count')).testRun({data: ethernet, repeat: 5});
	t.deepEqual(runs.lookup(u32(0)), u64(5n));
	t.is(mapOf(t, second, 'runs').info().id, runs.info().id);
});

test('a map of another shape is not reused', t => {
	const array = mapOf(t, loaded(t, 'small_kinds'), 'array');
	const object = opened(t, 'small');
	kernelError(t, 'EINVAL', () => {
		object.reuseMap('runs', array);
	});
});

test('handles outlive their object', t => {
	const object = loaded(t, 'small');
	const runs = mapOf(t, object, 'runs');
	const program = held(t, object.program('count'));
	object.close();
	program.testRun({data: ethernet});
	t.deepEqual(runs.lookup(u32(0)), u64(1n));
});

test('a closed object refuses everything but close', t => {
	const object = loaded(t, 'small');
	object.close();
	object.close();
	for (const act of [() => object.maps(), () => object.programs(), () => object.btf(), () => object.map('runs'), () => object.globals('.rodata')]) {
		kernelError(t, 'EBADF', act);
	}
});

test('what is no ELF file, or not there, is told by its name', t => {
	t.regex(kernelError(t, 'ENOENT', () => native.openObject('/nonexistent/x.o')).message, /\/nonexistent\/x\.o: ENOENT/);
	const error = t.throws(() => native.openObject(new Uint8Array(100), 'zeros'));
	t.is(error!.message, 'bpf_object__open zeros: LIBBPF_ERRNO__FORMAT: BPF object format invalid');
	t.throws(() => native.openObject(7 as never), {instanceOf: TypeError});
	const directory = bpffs(t);
	t.throws(() => native.openObject(directory));
});

test('an object that ends in the middle is refused, wherever it is cut', t => {
	const whole = readFileSync(fixture('small_kinds'));
	const before = native.openHandles();
	for (let size = 0; size < whole.length; size += 61) {
		t.throws(() => {
			const object = native.openObject(whole.subarray(0, size), 'cut');
			object.close();
		}, undefined, `cut at ${size}`);
	}

	t.is(native.openHandles(), before);
});

test('a handle cannot be made from JS', t => {
	const runs = mapOf(t, loaded(t, 'small'), 'runs');
	const Constructor = runs.constructor as new (...given: unknown[]) => unknown;
	t.throws(() => new Constructor(0, 'stdin'), {instanceOf: TypeError, message: 'Illegal constructor'});
	t.notThrows(() => fstatSync(0));
});
