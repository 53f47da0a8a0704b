/**
Turns the bytes of map keys and values into JavaScript values and back, by the object's own BTF. Pure.

| C | JavaScript |
|---|---|
| `__u8` … `__u32`, signed too | number |
| `__u64`, `__s64` | bigint |
| `__be16`, `__be32` (by typedef name) | number, as a human reads it |
| `struct address` | text (address.ts) |
| `char x[N]` | text up to the first NUL |
| an enum | the enumerator's name |
| arrays | arrays |
| structs | objects; `snake_case` becomes `camelCase`; members named `pad…` are zero and not shown |
*/
import {isBigEndian, type Btf, type BtfType} from './btf.js';
import {addressFromBytes, addressToBytes} from './address.js';

export interface Codec<T = unknown> {
	readonly size: number;
	decode(bytes: Uint8Array): T;
	/** @throws TypeError or RangeError that names the field. */
	encode(value: T): Uint8Array;
}

interface Field {
	readonly size: number;
	read(view: DataView, at: number): unknown;
	write(view: DataView, at: number, value: unknown, path: string): void;
}

/** @throws TypeError for a struct with a hole, or a type that no map of ours should have (unions, pointers, bit-fields). */
export function createCodec<T>(btf: Btf, type: number): Codec<T> {
	const field = fieldOf(btf, type);
	return {
		size: field.size,
		decode(bytes) {
			if (bytes.byteLength !== field.size) {
				throw new RangeError(`Expected ${field.size} bytes, got ${bytes.byteLength}`);
			}

			return field.read(new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), 0) as T;
		},
		encode(value) {
			const bytes = new Uint8Array(field.size);
			field.write(new DataView(bytes.buffer), 0, value, '');
			return bytes;
		},
	};
}

const camelCase = (name: string) => name.replaceAll(/_(\w)/g, (_, letter: string) => letter.toUpperCase());

function fieldOf(btf: Btf, id: number): Field {
	const bigEndian = isBigEndian(btf, id);
	const type = btf.resolved(id);
	switch (type.kind) {
		case 'int': {
			return integerField(type, !bigEndian);
		}

		case 'enum': {
			return enumField(type);
		}

		case 'array': {
			const element = btf.resolved(type.element);
			return element.kind === 'int' && element.char ? textField(type.length) : arrayField(fieldOf(btf, type.element), type.length);
		}

		case 'struct': {
			return type.name === 'address' ? addressField(type.size) : structField(btf, type);
		}

		default: {
			throw new TypeError(`a ${type.kind} cannot be in a map`);
		}
	}
}

function integerField(type: BtfType & {kind: 'int'}, littleEndian: boolean): Field {
	const {size, signed} = type;
	const bits = size * 8;
	// Of the value's own type: to make a bigint of every number costs more than all the rest.
	const inType = size === 8 ? BigInt : Number;
	const low = inType(signed ? -(2n ** BigInt(bits - 1)) : 0n);
	const high = inType(2n ** BigInt(signed ? bits - 1 : bits) - 1n);
	return {
		size,
		read(view, at) {
			switch (size) {
				case 1: {
					return signed ? view.getInt8(at) : view.getUint8(at);
				}

				case 2: {
					return signed ? view.getInt16(at, littleEndian) : view.getUint16(at, littleEndian);
				}

				case 4: {
					return signed ? view.getInt32(at, littleEndian) : view.getUint32(at, littleEndian);
				}

				default: {
					return signed ? view.getBigInt64(at, littleEndian) : view.getBigUint64(at, littleEndian);
				}
			}
		},
		write(view, at, value, path) {
			const wanted = size === 8 ? 'bigint' : 'number';
			if (typeof value !== wanted || (wanted === 'number' && !Number.isInteger(value))) {
				throw new TypeError(`${path || 'value'}: expected ${size === 8 ? 'a bigint' : 'an integer'}, got ${String(value)}`);
			}

			if ((value as number | bigint) < low || (value as number | bigint) > high) {
				throw new RangeError(`${path || 'value'}: ${String(value)} does not fit ${bits} bits`);
			}

			switch (size) {
				case 1: {
					view.setUint8(at, value as number);
					break;
				}

				case 2: {
					view.setUint16(at, value as number, littleEndian);
					break;
				}

				case 4: {
					view.setUint32(at, value as number, littleEndian);
					break;
				}

				default: {
					view.setBigUint64(at, value as bigint, littleEndian);
				}
			}
		},
	};
}

function enumField(type: BtfType & {kind: 'enum'}): Field {
	const names = new Map([...type.values].map(([name, value]) => [value, name]));
	return {
		size: type.size,
		read(view, at) {
			const value = view.getInt32(at, true);
			return names.get(value) ?? String(value);
		},
		write(view, at, value, path) {
			const number = type.values.get(value as string);
			if (number === undefined) {
				throw new TypeError(`${path || 'value'}: ${String(value)} is not one of enum ${type.name}`);
			}

			view.setInt32(at, number, true);
		},
	};
}

function textField(size: number): Field {
	return {
		size,
		read(view, at) {
			const bytes = Buffer.from(view.buffer, view.byteOffset + at, size);
			const end = bytes.indexOf(0);
			return bytes.subarray(0, end === -1 ? size : end).toString();
		},
		write(view, at, value, path) {
			const bytes = Buffer.from(String(value));
			if (typeof value !== 'string' || bytes.length >= size || bytes.includes(0)) {
				throw new RangeError(`${path || 'value'}: expected text of at most ${size - 1} bytes`);
			}

			new Uint8Array(view.buffer, view.byteOffset + at, size).set(bytes);
		},
	};
}

function addressField(size: number): Field {
	return {
		size,
		read: (view, at) => addressFromBytes(new Uint8Array(view.buffer, view.byteOffset + at, size)),
		write(view, at, value, path) {
			if (typeof value !== 'string') {
				throw new TypeError(`${path || 'value'}: expected an address`);
			}

			new Uint8Array(view.buffer, view.byteOffset + at, size).set(addressToBytes(value));
		},
	};
}

function arrayField(element: Field, length: number): Field {
	return {
		size: element.size * length,
		read: (view, at) => Array.from({length}, (_, index) => element.read(view, at + index * element.size)),
		write(view, at, value, path) {
			if (!Array.isArray(value) || value.length !== length) {
				throw new TypeError(`${path || 'value'}: expected an array of ${length}`);
			}

			for (const [index, item] of value.entries()) {
				element.write(view, at + index * element.size, item, `${path}[${index}]`);
			}
		},
	};
}

function structField(btf: Btf, type: BtfType & {kind: 'struct' | 'union'}): Field {
	const members: Array<{name: string; offset: number; field: Field}> = [];
	let end = 0;
	for (const member of type.members) {
		if (!Number.isInteger(member.offset)) {
			throw new TypeError(`struct ${type.name}: ${member.name} is a bit-field`);
		}

		refuseHole(type.name, member.offset - end, `before ${member.name}`);
		const field = fieldOf(btf, member.type);
		end = member.offset + field.size;
		if (!member.name.startsWith('pad')) {
			members.push({name: camelCase(member.name), offset: member.offset, field});
		}
	}

	refuseHole(type.name, type.size - end, 'at the end');
	const known = new Set(members.map(({name}) => name));
	return {
		size: type.size,
		read: (view, at) => Object.fromEntries(members.map(({name, offset, field}) => [name, field.read(view, at + offset)])),
		write(view, at, value, path) {
			if (typeof value !== 'object' || value === null) {
				throw new TypeError(`${path || 'value'}: expected struct ${type.name}`);
			}

			const stranger = Object.keys(value).find(name => !known.has(name));
			if (stranger !== undefined) {
				throw new TypeError(`${path || 'value'}: struct ${type.name} has no ${stranger}`);
			}

			for (const {name, offset, field} of members) {
				field.write(view, at + offset, (value as Record<string, unknown>)[name], path ? `${path}.${name}` : name);
			}
		},
	};
}

/** A hole's bytes are whatever was on the stack, and keys are compared as bytes. */
function refuseHole(struct: string, size: number, where: string): void {
	if (size > 0) {
		throw new TypeError(`struct ${struct}: ${size}-byte hole ${where}; name it 'pad'`);
	}
}
