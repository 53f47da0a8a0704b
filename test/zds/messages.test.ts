import test from 'ava';
import {PodError} from '../../src/errors.js';
import {SNAPSHOT_SENT, decodeAck, decodeHello, encodeAdd, encodeDelete, encodeKeep} from '../../src/zds/messages.js';

const bytes = (hex: string) => Buffer.from(hex.replaceAll(/\s/g, ''), 'hex');
const hex = (packet: Uint8Array) => Buffer.from(packet).toString('hex');

test('requests are the bytes that the .proto prescribes', t => {
	t.is(hex(encodeAdd({uid: 'u-1', name: 'web', namespace: 'shop', serviceAccount: 'sa'})), hex(bytes(`
		0a 16
			0a 03 75 2d 31
			12 0f
				0a 03 77 65 62
				12 04 73 68 6f 70
				1a 02 73 61`)));
	t.is(hex(encodeKeep('u-1')), hex(bytes('2a 05 0a 03 75 2d 31')));
	t.is(hex(encodeDelete('u-1')), hex(bytes('12 05 12 03 75 2d 31')));
	t.is(hex(SNAPSHOT_SENT), hex(bytes('1a 00')));
});

test('lengths of 128 bytes and more take two bytes', t => {
	t.is(hex(encodeKeep('x'.repeat(200))), `2acb010ac801${'78'.repeat(200)}`);
});

test('the longest names that Kubernetes admits fit; one that is longer is refused, with all lengths', t => {
	const uid = 'u'.repeat(36);
	t.true(encodeAdd({uid, name: 'n'.repeat(253), namespace: 's'.repeat(63), serviceAccount: 'a'.repeat(253)}).length <= 1024);
	t.notThrows(() => encodeAdd({uid, name: 'n', namespace: 's', serviceAccount: 'a'.repeat(971)}));
	t.throws(() => encodeAdd({uid, name: 'n', namespace: 's', serviceAccount: 'a'.repeat(972)}), {
		instanceOf: PodError,
		message: 'pod s/n: ztunnel cannot be told of it: the message has 1025 bytes of at most 1024 (uid 36, name 1, namespace 1, service account 972): shorten the longest of these names',
	});
});

test('answers are read as the .proto prescribes, and what is new in them is skipped', t => {
	t.is(decodeHello(bytes('08 01')), 1);
	t.is(decodeHello(bytes('')), 0);
	t.is(decodeHello(bytes('08 02')), 2);
	t.is(decodeHello(bytes('12 02 68 69 08 01')), 1);
	t.is(decodeAck(bytes('0a 00')), '');
	t.is(decodeAck(bytes('0a 02 0a 00')), '');
	t.is(decodeAck(bytes('0a 04 0a 02 6e 6f')), 'no');
	t.is(decodeAck(bytes('12 01 41 0a 06 10 05 0a 02 6e 6f')), 'no');
});

for (const [what, packet] of Object.entries({
	nothing: '',
	'a field without its value': '0a',
	'an ack longer than the packet': '0a 05 0a 03 41',
	'an error longer than its ack': '0a 03 0a 02 41',
	'an error that ends in the middle of a length': '0a 02 0a 80',
	'an ack that is a number': '08 01',
	'an error that is a number': '0a 02 08 01',
	'a length without end': '80 80 80 80 80 80 80 80 80 80 80',
	'a length of 64 bits': '0a ff ff ff ff ff ff ff ff ff 01',
	'field number 0': '02 00',
	'a group': '0b 0c',
	'no ack': '12 00',
})) {
	test(`no answer: ${what}`, t => {
		t.throws(() => decodeAck(bytes(packet)), {instanceOf: TypeError});
	});
}

for (const [what, packet] of Object.entries({'a version that is a text': '0a 01 31', 'a version without end': '08 80', 'an answer': '0a 00', garbage: '01 02 03'})) {
	test(`no hello: ${what}`, t => {
		t.throws(() => decodeHello(bytes(packet)), {instanceOf: TypeError});
	});
}
