/**
Ranges with flags, flattened for one longest prefix match: each entry gets the flags of all ranges that contain it. Pure.
*/
import {NO_ADDRESS, addressToBytes, isIpv4Address} from '../maps/address.js';
import type {Cidr} from './capture.js';

export interface Range extends Cidr {
	/** Hold for everything inside. */
	readonly flags?: number;
	/** Hold only where no longer route contains the address: what a routing table says of it. */
	readonly route?: number;
}

export interface Prefix {
	readonly address: string;
	/** 0 to 128, of the 16-byte form. */
	readonly bits: number;
	readonly flags: number;
}

const IPV4_BITS = 96;

/** The entries that differ from what contains them, and the root of IPv4, which must not inherit from `::/0`. */
export function flatten(ranges: readonly Range[]): readonly Prefix[] {
	const merged = new Map<string, {bytes: Uint8Array; bits: number; address: string; isIpv4: boolean; flags: number; route: number | undefined}>();
	for (const {address, bits, flags = 0, route} of [{address: '0.0.0.0', bits: 0}, ...ranges] as Range[]) {
		const isIpv4 = isIpv4Address(address);
		const long = isIpv4 ? IPV4_BITS + bits : bits;
		const key = `${address}/${long}`;
		const before = merged.get(key);
		merged.set(key, {
			bytes: before?.bytes ?? addressToBytes(address), bits: long, address, isIpv4,
			flags: flags | (before?.flags ?? 0),
			route: route ?? before?.route,
		});
	}

	// By address, the shorter first: what contains an entry stands before it.
	const sorted = [...merged.values()].sort((a, b) => Number(a.isIpv4) - Number(b.isIpv4) || Buffer.compare(a.bytes, b.bytes) || a.bits - b.bits);
	const prefixes: Prefix[] = [];
	const around: Array<{bytes: Uint8Array; bits: number; isIpv4: boolean; flags: number; route: number}> = [];
	for (const {bytes, bits, address, isIpv4, flags: own, route: ownRoute} of sorted) {
		while (around.length > 0 && !contains(around.at(-1)!, {bytes, isIpv4})) {
			around.pop();
		}

		const outer = around.at(-1);
		const flags = own | (outer?.flags ?? 0);
		const route = ownRoute ?? outer?.route ?? 0;
		around.push({bytes, bits, isIpv4, flags, route});
		const isRoot = isIpv4 && bits === IPV4_BITS;
		if (isRoot || (flags | route) !== ((outer?.flags ?? 0) | (outer?.route ?? 0))) {
			prefixes.push({address, bits, flags: flags | route});
		}
	}

	return prefixes;
}

function contains(outer: {readonly bytes: Uint8Array; readonly bits: number; readonly isIpv4: boolean}, inner: {readonly bytes: Uint8Array; readonly isIpv4: boolean}): boolean {
	if (outer.isIpv4 !== inner.isIpv4) {
		return false;
	}

	const whole = outer.bits >> 3;
	const rest = outer.bits & 7;
	return outer.bytes.subarray(0, whole).every((byte, index) => byte === inner.bytes[index])
		&& (rest === 0 || ((outer.bytes[whole]! ^ inner.bytes[whole]!) >> (8 - rest)) === 0);
}

/** Inside 127.0.0.0/8, or ::1. */
export function isLoopback(address: string): boolean {
	return address === '::1' || address.startsWith('127.');
}

export function isIpv6(address: string): boolean {
	return address === NO_ADDRESS || address.includes(':');
}
