/**
IP addresses as text and as the 16 bytes of `struct address` (bpf/layout.h): network order, IPv4 as ::ffff:a.b.c.d. Pure.
*/
import {isIPv4, isIPv6} from 'node:net';

export const NO_ADDRESS = '';
const MAPPED = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/** @throws TypeError when it is not an address, or has a zone (`%eth0`). */
export function addressToBytes(text: string): Uint8Array {
	const bytes = new Uint8Array(16);
	if (text === NO_ADDRESS) {
		return bytes;
	}

	if (isIPv4(text)) {
		bytes.set(MAPPED);
		bytes.set(text.split('.').map(Number), MAPPED.length);
		return bytes;
	}

	if (!isIPv6(text) || text.includes('%')) {
		throw new TypeError(`Expected an IP address, got '${text}'`);
	}

	// A dotted tail counts for two groups.
	const dotted = /(\d+)\.(\d+)\.(\d+)\.(\d+)$/.exec(text);
	const hex = dotted
		? text.slice(0, dotted.index) + [[1, 2], [3, 4]].map(pair => pair.map(index => Number(dotted[index]).toString(16).padStart(2, '0')).join('')).join(':')
		: text;
	const [head = '', tail = ''] = hex.split('::');
	const parse = (part: string) => part === '' ? [] : part.split(':').flatMap(group => [Number.parseInt(group, 16) >> 8, Number.parseInt(group, 16) & 0xff]);
	const right = parse(tail);
	bytes.set(parse(head));
	bytes.set(right, bytes.length - right.length);
	return bytes;
}

/** The one canonical form (RFC 5952); IPv4-mapped addresses as IPv4; all zero is {@link NO_ADDRESS}. */
export function addressFromBytes(bytes: Uint8Array): string {
	if (bytes.length === 4) {
		return bytes.join('.');
	}

	if (bytes.every(byte => byte === 0)) {
		return NO_ADDRESS;
	}

	if (MAPPED.every((byte, index) => bytes[index] === byte)) {
		return bytes.subarray(12).join('.');
	}

	const groups = Array.from({length: 8}, (_, index) => ((bytes[index * 2]! << 8) | bytes[index * 2 + 1]!).toString(16));
	let best = {start: -1, length: 1};
	for (let start = 0; start < 8; start++) {
		let length = 0;
		while (groups[start + length] === '0') {
			length++;
		}

		if (length > best.length) {
			best = {start, length};
		}
	}

	return best.start === -1
		? groups.join(':')
		: `${groups.slice(0, best.start).join(':')}::${groups.slice(best.start + best.length).join(':')}`;
}

/** @throws TypeError as {@link addressToBytes}. */
export function canonicalAddress(text: string): string {
	return addressFromBytes(addressToBytes(text));
}

export function isIpv4Address(text: string): boolean {
	return isIPv4(text);
}
