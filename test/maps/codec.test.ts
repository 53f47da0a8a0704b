import {fileURLToPath} from 'node:url';
import test from 'ava';
import {addressFromBytes, addressToBytes, canonicalAddress} from '../../src/maps/address.js';
import {createCodec} from '../../src/maps/codec.js';
import type {Btf} from '../../src/maps/btf.js';
import * as schemaModule from '../../src/maps/schema.js';
import {MAP_NAMES, Schema, type HandshakeKey, type PodValue, type PrefixKey} from '../../src/maps/schema.js';
import {native} from '../../src/native.js';

const object = native.openObject(fileURLToPath(new URL('../../../build/sidestep.bpf.o', import.meta.url)));
const schema = new Schema(object.btf());
const codecOf = <T>(map: string, side: 'key' | 'value') => createCodec<T>(schema.btf, schema.btf.maps().get(map)![side]);
const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const target = {address: '', source: '', port: 0, inPod: 0, spread: 0};

test('sizes from BTF are the sizes that the object declares', t => {
	const specs = new Map(object.maps().map(spec => [spec.name, spec]));
	t.deepEqual([...specs.keys()].sort(), [...MAP_NAMES].sort());
	for (const name of MAP_NAMES) {
		t.is(schema.sizes(name).key, specs.get(name)!.keySize, name);
		t.is(schema.sizes(name).value, specs.get(name)!.valueSize, name);
	}
});

test('the worked example of ARCHITECTURE.md is true', t => {
	const pod: PodValue = {
		policy: 3, flags: 0, exemptCgroupLevels: 0, markCount: 1,
		marks: [{value: 0x539, mask: 0xfff}, ...Array.from({length: 3}, () => ({value: 0, mask: 0}))],
		proxyUid: 0, proxyGid: 0, inboundPort: 0, dnsPort: 0,
		target4: {address: '10.0.0.2', source: '10.0.0.2', port: 15_001, inPod: 1, spread: 1}, target6: target,
	};
	t.is(hex(codecOf<PodValue>('pods', 'value').encode(pod)), [
		'0300000000000000', '0000000001000000', '39050000ff0f0000', '00'.repeat(24), '00'.repeat(16),
		'00000000000000000000ffff0a000002', '00000000000000000000ffff0a000002', '3a99010001000000', '00'.repeat(40),
	].join(''));
	t.is(hex(codecOf<PrefixKey>('prefixes', 'key').encode({bits: 160, policy: 3, address: '10.0.0.2'})), 'a00000000000000300000000000000000000ffff0a000002');
	const handshake = codecOf<HandshakeKey>('handshakes', 'key');
	const key = {netns: 4711n, client: '10.0.0.2', proxy: '10.0.0.2', clientPort: 40_000, proxyPort: 15_001};
	t.is(hex(handshake.encode(key)), '671200000000000000000000000000000000ffff0a00000200000000000000000000ffff0a000002409c993a00000000');
	t.deepEqual(handshake.decode(handshake.encode(key)), key);
	t.is(hex(codecOf('handshakes', 'value').encode({address: '10.0.9.9', port: 80, inPod: 1, role: 'ROLE_PROXY', netns: 4711n, dnsPort: 0})), '00000000000000000000ffff0a000909005001000200000067120000000000000000000000000000');
});

test('the bits that TypeScript knows are those of the object', t => {
	const known = schemaModule as unknown as Readonly<Record<string, number>>;
	for (const name of ['pod_flags', 'prefix_flags', 'port_flags', 'namespace_change', 'role']) {
		for (const [bit, value] of schema.btf.enum(name)) {
			t.is(known[bit] ?? (bit === 'ROLE_RESOLVER' ? value : undefined), value, bit);
		}
	}
});

test('what is written is read back', t => {
	const samples: Array<[string, 'key' | 'value', unknown]> = [
		['pods', 'key', 2n ** 64n - 1n],
		['pod_info', 'value', {name: 'shop/wéb', mode: 'proxy', address4: '10.0.0.2', address6: 'fd00::2', netnsDevice: 4n, netnsInode: 4_026_531_840n, enrolledAtMs: 1_795_230_695_007n, namespaceChanges: 255}],
		['prefixes', 'value', {flags: 63}],
		['ports', 'key', {policy: 1, port: 65_535}],
		['addresses', 'key', {bits: 128, address: 'fd00::2'}],
		['passes', 'key', {client: '10.0.0.1', server: '10.0.0.2', clientPort: 40_000, serverPort: 80}],
		['passes', 'value', {reason: 'REASON_INBOUND_BYPASS_NODE'}],
		['exemptions', 'key', {policy: 0xff_ff_ff_ff, kind: 'EXEMPT_CGROUP', id: 77n}],
		['handshakes', 'key', {netns: 0n, client: 'fd00::2', proxy: '::1', clientPort: 65_535, proxyPort: 1}],
		['handshakes', 'value', {address: '::1', port: 65_535, inPod: 0, role: 'ROLE_CLIENT', netns: 1n, dnsPort: 15_053}],
		['build', 'value', {layout: 1, version: '0.1.0', objectSha256: 'f'.repeat(64)}],
	];
	for (const [map, side, value] of samples) {
		const codec = codecOf<unknown>(map, side);
		t.deepEqual(codec.decode(codec.encode(value)), value, `${map} ${side}`);
	}
});

test('values that do not fit are refused by name', t => {
	const codec = codecOf<unknown>('prefixes', 'key');
	t.throws(() => codec.encode({bits: -1, policy: 1, address: ''}), {message: 'bits: -1 does not fit 32 bits'});
	t.throws(() => codec.encode({bits: 1.5, policy: 1, address: ''}), {message: 'bits: expected an integer, got 1.5'});
	t.throws(() => codec.encode({policy: 1, address: ''}), {message: 'bits: expected an integer, got undefined'});
	t.throws(() => codec.encode({bits: 1, policy: 1, address: '', more: 1}), {message: 'value: struct prefix_key has no more'});
	t.throws(() => codec.encode({bits: 1, policy: 1, address: 'x'}), {message: /Expected an IP address/});
	t.throws(() => codec.decode(new Uint8Array(3)), {message: 'Expected 24 bytes, got 3'});
	t.throws(() => codecOf<unknown>('passes', 'value').encode({reason: 'REASON_NONE'}), {message: 'reason: REASON_NONE is not one of enum reason'});
	const info = codecOf<unknown>('pod_info', 'value');
	t.throws(() => info.encode({name: 'x'.repeat(320), mode: '', address4: '', address6: '', netnsDevice: 0n, netnsInode: 0n, enrolledAtMs: 0n, namespaceChanges: 0}), {message: 'name: expected text of at most 319 bytes'});
});

test('a hole in a struct is refused by name', t => {
	const u32 = {kind: 'int', name: 'unsigned int', size: 4, signed: false, char: false} as const;
	const btf = (size: number, offset: number) => {
		const types = [{kind: 'other'}, u32, {kind: 'struct', name: 'flow', size, members: [{name: 'a', type: 1, offset: 0}, {name: 'b', type: 1, offset}]}] as const;
		return {type: (id: number) => types[id], unqualified: (id: number) => types[id], resolved: (id: number) => types[id]} as unknown as Btf;
	};

	t.throws(() => createCodec(btf(12, 4), 2), {message: 'struct flow: 4-byte hole at the end; name it \'pad\''});
	t.throws(() => createCodec(btf(12, 8), 2), {message: 'struct flow: 4-byte hole before b; name it \'pad\''});
	t.notThrows(() => createCodec(btf(8, 4), 2));
});

test('reasons are the enum\'s names, in the order of the counters', t => {
	t.is(schema.reasons[0], 'redirected');
	t.true(schema.reasons.includes('bypass_cgroup'));
	t.is(codecOf<{count: bigint[]}>('counters', 'value').size, schema.reasons.length * 8);
});

const sameAddress = test.macro({
	exec(t, text: string, canonical: string) {
		t.is(canonicalAddress(text), canonical);
		t.is(addressFromBytes(addressToBytes(text)), canonical);
	},
	title: (_, text) => `the address ${text} has one form`,
});
test(sameAddress, '10.0.0.1', '10.0.0.1');
test(sameAddress, '::ffff:10.0.0.1', '10.0.0.1');
test(sameAddress, '::', '');
test(sameAddress, '::1', '::1');
test(sameAddress, 'FD00:0:0:0:0:0:0:1', 'fd00::1');
test(sameAddress, '2001:db8:0:1:1:1:1:1', '2001:db8:0:1:1:1:1:1');
test(sameAddress, '2001:0:0:1:0:0:0:1', '2001:0:0:1::1');
test(sameAddress, '64:ff9b::192.0.2.33', '64:ff9b::c000:221');
test(sameAddress, 'fe80::', 'fe80::');

for (const bad of ['', 'x', '10.0.0', 'fe80::1%eth0', '1.2.3.4.5', '10.0.0.1/8']) {
	test(`'${bad}' is ${bad === '' ? 'no address' : 'refused as an address'}`, t => {
		if (bad === '') {
			t.true(addressToBytes(bad).every(byte => byte === 0));
		} else {
			t.throws(() => addressToBytes(bad), {instanceOf: TypeError});
		}
	});
}
