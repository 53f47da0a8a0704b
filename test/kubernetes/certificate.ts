/**
A self-signed certificate for a test's server, without a program: X.509 by hand, DER by the few rules that it needs.
*/
import {Buffer} from 'node:buffer';
import {generateKeyPairSync, randomBytes, sign} from 'node:crypto';

export interface Certificate {
	/** PEM, both. The certificate is its own authority. */
	readonly key: string;
	readonly cert: string;
}

const oid = (hex: string) => element(0x06, Buffer.from(hex, 'hex'));
const ECDSA_WITH_SHA256 = '2a8648ce3d040302';
const COMMON_NAME = '550403';
const BASIC_CONSTRAINTS = '551d13';
const SUBJECT_ALT_NAME = '551d11';

/** Good for localhost, 127.0.0.1 and ::1, until 2049. */
export function makeCertificate(): Certificate {
	const {publicKey, privateKey} = generateKeyPairSync('ec', {namedCurve: 'P-256'});
	const algorithm = sequence(oid(ECDSA_WITH_SHA256));
	const name = sequence(set(sequence(oid(COMMON_NAME), element(0x0c, Buffer.from('sidestep test')))));
	const names = sequence(
		element(0x82, Buffer.from('localhost')),
		element(0x87, Buffer.from([127, 0, 0, 1])),
		element(0x87, Buffer.from([...Buffer.alloc(15), 1])),
	);
	const extension = (id: string, value: Buffer) => sequence(oid(id), element(0x04, value));
	const body = sequence(
		element(0xa0, integer(Buffer.from([2]))),
		integer(Buffer.from([1, ...randomBytes(8)])),
		algorithm,
		name,
		sequence(utcTime('200101000000Z'), utcTime('491231235959Z')),
		name,
		publicKey.export({type: 'spki', format: 'der'}),
		element(0xa3, sequence(extension(BASIC_CONSTRAINTS, sequence(element(0x01, Buffer.from([0xff])))), extension(SUBJECT_ALT_NAME, names))),
	);
	const certificate = sequence(body, algorithm, bitString(sign('sha256', body, privateKey)));
	const lines = certificate.toString('base64').match(/.{1,64}/g)!.join('\n');
	return {
		key: privateKey.export({type: 'pkcs8', format: 'pem'}) as string,
		cert: `-----BEGIN CERTIFICATE-----\n${lines}\n-----END CERTIFICATE-----\n`,
	};
}

function element(tag: number, content: Buffer): Buffer {
	const {length} = content;
	const head = length < 0x80 ? [tag, length] : length < 0x1_00 ? [tag, 0x81, length] : [tag, 0x82, length >> 8, length & 0xff];
	return Buffer.concat([Buffer.from(head), content]);
}

function sequence(...parts: readonly Buffer[]): Buffer {
	return element(0x30, Buffer.concat(parts));
}

function set(...parts: readonly Buffer[]): Buffer {
	return element(0x31, Buffer.concat(parts));
}

function integer(value: Buffer): Buffer {
	return element(0x02, value);
}

function bitString(value: Buffer): Buffer {
	return element(0x03, Buffer.concat([Buffer.from([0]), value]));
}

function utcTime(text: string): Buffer {
	return element(0x17, Buffer.from(text));
}
