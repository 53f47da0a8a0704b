/**
Reads the type information (BTF) of a compiled BPF object: linux/Documentation/bpf/btf.rst. Pure.
*/

export type BtfType =
	| {readonly kind: 'int'; readonly name: string; readonly size: number; readonly signed: boolean; readonly char: boolean}
	| {readonly kind: 'array'; readonly element: number; readonly length: number}
	| {readonly kind: 'struct' | 'union'; readonly name: string; readonly size: number; readonly members: readonly BtfMember[]}
	| {readonly kind: 'enum'; readonly name: string; readonly size: number; readonly values: ReadonlyMap<string, number>}
	| {readonly kind: 'typedef'; readonly name: string; readonly target: number}
	| {readonly kind: 'qualifier' | 'pointer'; readonly target: number}
	| {readonly kind: 'variable'; readonly name: string; readonly target: number}
	| {readonly kind: 'section'; readonly name: string; readonly variables: readonly number[]}
	| {readonly kind: 'other'};

export interface BtfMember {
	readonly name: string;
	readonly type: number;
	/** Bytes from the start of the struct. */
	readonly offset: number;
}

const MAGIC = 0xeb9f;

/** Kinds by number, with how many bytes follow the 12-byte record: `n` is its vlen. */
const KINDS: ReadonlyArray<readonly [name: string, extra: (n: number) => number]> = [
	['void', () => 0],
	['int', () => 4],
	['pointer', () => 0],
	['array', () => 12],
	['struct', n => n * 12],
	['union', n => n * 12],
	['enum', n => n * 8],
	['forward', () => 0],
	['typedef', () => 0],
	['volatile', () => 0],
	['const', () => 0],
	['restrict', () => 0],
	['function', () => 0],
	['prototype', n => n * 8],
	['variable', () => 4],
	['section', n => n * 12],
	['float', () => 0],
	['declTag', () => 4],
	['typeTag', () => 0],
	['enum64', n => n * 12],
];

export class Btf {
	/** By type id; 0 is void. */
	readonly types: readonly BtfType[];

	constructor(bytes: Uint8Array) {
		const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
		if (bytes.byteLength < 24 || view.getUint16(0, true) !== MAGIC) {
			throw new TypeError('Expected little-endian BTF');
		}

		const header = view.getUint32(4, true);
		const typesStart = header + view.getUint32(8, true);
		const typesEnd = typesStart + view.getUint32(12, true);
		const strings = bytes.subarray(header + view.getUint32(16, true));
		const text = (offset: number) => Buffer.from(strings.subarray(offset, strings.indexOf(0, offset))).toString();

		const types: BtfType[] = [{kind: 'other'}];
		for (let at = typesStart; at < typesEnd;) {
			const info = view.getUint32(at + 4, true);
			const vlen = info & 0xff_ff;
			const kind = KINDS[(info >>> 24) & 0x1f];
			if (!kind) {
				throw new TypeError(`BTF kind ${(info >>> 24) & 0x1f} is not known`);
			}

			types.push(readType(view, at, kind[0], vlen, (info >>> 31) === 1, text));
			at += 12 + kind[1](vlen);
		}

		this.types = types;
	}

	type(id: number): BtfType {
		const type = this.types[id];
		if (!type) {
			throw new RangeError(`BTF has no type ${id}`);
		}

		return type;
	}

	/** The type behind const, volatile and the like; typedefs are kept, as their names carry the byte order. */
	unqualified(id: number): BtfType {
		let type = this.type(id);
		while (type.kind === 'qualifier') {
			type = this.type(type.target);
		}

		return type;
	}

	/** The type behind typedefs too. */
	resolved(id: number): BtfType {
		let type = this.unqualified(id);
		while (type.kind === 'typedef') {
			type = this.unqualified(type.target);
		}

		return type;
	}

	/** Key and value types of every map declared in `.maps`, by the map's name. */
	maps(): ReadonlyMap<string, {readonly key: number; readonly value: number}> {
		const maps = new Map<string, {key: number; value: number}>();
		const section = this.types.find(type => type.kind === 'section' && type.name === '.maps');
		for (const id of section?.kind === 'section' ? section.variables : []) {
			const variable = this.type(id);
			const definition = variable.kind === 'variable' ? this.resolved(variable.target) : undefined;
			if (variable.kind !== 'variable' || definition?.kind !== 'struct') {
				continue;
			}

			// __type(key, T) declares a member `T *key`.
			const pointed = (name: string) => {
				const member = definition.members.find(member => member.name === name);
				const pointer = member && this.type(member.type);
				return pointer?.kind === 'pointer' ? pointer.target : undefined;
			};

			const key = pointed('key');
			const value = pointed('value');
			if (key !== undefined && value !== undefined) {
				maps.set(variable.name, {key, value});
			}
		}

		return maps;
	}

	/** An enum's values by the enumerator's name. */
	enum(name: string): ReadonlyMap<string, number> {
		for (const type of this.types) {
			if (type.kind === 'enum' && type.name === name) {
				return type.values;
			}
		}

		throw new RangeError(`BTF has no enum ${name}: it needs a variable that uses it`);
	}

	/** A struct's type id. */
	struct(name: string): number {
		const id = this.types.findIndex(type => type.kind === 'struct' && type.name === name);
		if (id === -1) {
			throw new RangeError(`BTF has no struct ${name}: it needs a variable that uses it`);
		}

		return id;
	}

	/** Bytes of a type. */
	size(id: number): number {
		const type = this.resolved(id);
		switch (type.kind) {
			case 'int':
			case 'struct':
			case 'union':
			case 'enum': {
				return type.size;
			}

			case 'array': {
				return type.length * this.size(type.element);
			}

			case 'pointer': {
				return 8;
			}

			default: {
				throw new TypeError(`A ${type.kind} has no size`);
			}
		}
	}
}

/** By the typedef's name: __be16, __be32. */
export function isBigEndian(btf: Btf, id: number): boolean {
	for (let type = btf.unqualified(id); type.kind === 'typedef'; type = btf.unqualified(type.target)) {
		if (type.name.startsWith('__be')) {
			return true;
		}
	}

	return false;
}

function readType(view: DataView, at: number, kind: string, vlen: number, flag: boolean, text: (offset: number) => string): BtfType {
	const name = text(view.getUint32(at, true));
	const sizeOrType = view.getUint32(at + 8, true);
	const extra = at + 12;
	const items = <T>(stride: number, read: (at: number) => T): T[] => Array.from({length: vlen}, (_, index) => read(extra + index * stride));

	switch (kind) {
		case 'int': {
			const encoding = (view.getUint32(extra, true) >>> 24) & 0xf;
			return {kind, name, size: sizeOrType, signed: (encoding & 1) !== 0, char: name === 'char'};
		}

		case 'array': {
			return {kind, element: view.getUint32(extra, true), length: view.getUint32(extra + 8, true)};
		}

		case 'struct':
		case 'union': {
			return {kind, name, size: sizeOrType, members: items(12, at => {
				// With kind_flag the upper 8 bits are a bit-field's size.
				const raw = view.getUint32(at + 8, true);
				const bits = flag ? raw & 0xff_ff_ff : raw;
				return {name: text(view.getUint32(at, true)), type: view.getUint32(at + 4, true), offset: bits / 8};
			})};
		}

		case 'enum': {
			return {kind, name, size: sizeOrType, values: new Map(items(8, at => [text(view.getUint32(at, true)), view.getInt32(at + 4, true)]))};
		}

		case 'typedef': {
			return {kind, name, target: sizeOrType};
		}

		case 'pointer': {
			return {kind, target: sizeOrType};
		}

		case 'const':
		case 'volatile':
		case 'restrict':
		case 'typeTag': {
			return {kind: 'qualifier', target: sizeOrType};
		}

		case 'variable': {
			return {kind, name, target: sizeOrType};
		}

		case 'section': {
			return {kind, name, variables: items(12, at => view.getUint32(at, true))};
		}

		default: {
			return {kind: 'other'};
		}
	}
}
