import {native, type BpfMap} from '../native.js';
import {MapFullError, hasErrno} from '../errors.js';
import type {Codec} from './codec.js';

/** A map whose keys and values are JavaScript values. Reads and writes are system calls each time: nothing is cached. */
export class TypedMap<K, V> {
	constructor(
		readonly name: string,
		readonly raw: BpfMap,
		readonly key: Codec<K>,
		readonly value: Codec<V>,
	) {}

	get(key: K): V | undefined {
		const bytes = this.raw.lookup(this.key.encode(key));
		return bytes && this.value.decode(bytes);
	}

	/** @throws MapFullError when there is no room for a new key (the kernel says E2BIG for hashes, ENOSPC for tries). */
	set(key: K, value: V): void {
		this.write(key, this.value.encode(value));
	}

	/** @returns whether the key was there. */
	delete(key: K): boolean {
		return this.raw.delete(this.key.encode(key));
	}

	keys(): readonly K[] {
		const {count, keys} = this.raw.entries();
		return Array.from({length: count}, (_, index) => this.key.decode(slice(keys, index, this.key.size)));
	}

	/** All entries, in no order. */
	entries(): Array<[K, V]> {
		const {count, keys, values} = this.raw.entries();
		return Array.from({length: count}, (_, index) => [
			this.key.decode(slice(keys, index, this.key.size)),
			this.value.decode(slice(values, index, this.value.size)),
		]);
	}

	protected write(key: K, bytes: Uint8Array): void {
		try {
			this.raw.update(this.key.encode(key), bytes);
		} catch (error) {
			if (hasErrno(error, 'E2BIG', 'ENOSPC')) {
				throw new MapFullError(this.name, this.raw.info().maxEntries, {cause: error});
			}

			throw error;
		}
	}
}

/** A per-CPU map: one value for each possible CPU. */
export class PerCpuMap<K, V> extends TypedMap<K, V> {
	readonly #cpus = native.possibleCpus();
	/** The kernel rounds each CPU's slot up to 8 bytes. */
	readonly #stride = Math.ceil(this.value.size / 8) * 8;

	getAll(key: K): V[] | undefined {
		const bytes = this.raw.lookup(this.key.encode(key));
		return bytes && this.#split(bytes);
	}

	/** Sets every CPU's value to the same. */
	override set(key: K, value: V): void {
		const bytes = new Uint8Array(this.#stride * this.#cpus);
		const one = this.value.encode(value);
		for (let cpu = 0; cpu < this.#cpus; cpu++) {
			bytes.set(one, cpu * this.#stride);
		}

		this.write(key, bytes);
	}

	entriesPerCpu(): Array<[K, V[]]> {
		const {count, keys, values} = this.raw.entries();
		return Array.from({length: count}, (_, index) => [
			this.key.decode(slice(keys, index, this.key.size)),
			this.#split(slice(values, index, this.#stride * this.#cpus)),
		]);
	}

	#split(bytes: Uint8Array): V[] {
		return Array.from({length: this.#cpus}, (_, cpu) => this.value.decode(bytes.subarray(cpu * this.#stride, cpu * this.#stride + this.value.size)));
	}
}

function slice(bytes: Uint8Array, index: number, size: number): Uint8Array {
	return bytes.subarray(index * size, (index + 1) * size);
}
