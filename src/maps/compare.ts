import {isBigEndian, type Btf} from './btf.js';

/** Ends of enums, which are never stored; they move as an enum grows. */
const BOUNDS = ['REASONS', 'TCP_REASONS'];

/**
What keeps bytes written as one type from being read as the other. Enums may have grown. Pure.

@returns undefined when nothing does: the same fields, of the same kinds, at the same places.
*/
export function findDifference(from: Btf, fromType: number, to: Btf, toType: number, where = 'value'): string | undefined {
	const a = from.resolved(fromType);
	const b = to.resolved(toType);
	if (a.kind !== b.kind) {
		return `${where} was a ${a.kind}, and is a ${b.kind}`;
	}

	if (from.size(fromType) !== to.size(toType)) {
		return `${where} had ${from.size(fromType)} bytes, and has ${to.size(toType)}`;
	}

	if (a.kind === 'array' && b.kind === 'array') {
		return a.length === b.length ? findDifference(from, a.element, to, b.element, `${where}[]`) : `${where} had ${a.length} elements, and has ${b.length}`;
	}

	if (a.kind === 'struct' && b.kind === 'struct') {
		const names = a.members.map(({name, offset}) => `${name} at ${offset}`);
		const stranger = b.members.find(({name, offset}, index) => names[index] !== `${name} at ${offset}`);
		if (stranger || a.members.length !== b.members.length) {
			return `${where} has other fields: ${stranger?.name ?? 'fewer'}`;
		}

		return a.members.map(({name, type}, index) => findDifference(from, type, to, b.members[index]!.type, `${where}.${name}`)).find(Boolean);
	}

	if (a.kind === 'enum' && b.kind === 'enum') {
		const moved = [...a.values].find(([name, value]) => !BOUNDS.includes(name) && b.values.get(name) !== value);
		return moved && `${where}: ${moved[0]} was ${moved[1]}, and is ${b.values.get(moved[0]) ?? 'gone'}`;
	}

	if (a.kind === 'int' && b.kind === 'int' && (a.signed !== b.signed || isBigEndian(from, fromType) !== isBigEndian(to, toType))) {
		return `${where} has another sign or byte order`;
	}

	return undefined;
}
