/**
Splits a stream of bytes at line feeds. Bytes, so that a character that is split over two chunks stays whole.
*/
import {Buffer, isUtf8} from 'node:buffer';

const LINE_FEED = 0x0a;
const START_BYTES = 4096;

export class LineSplitter {
	/** The line that has no end yet; grows by doubling, so that a trickle of single bytes costs no more than its bytes. */
	#pending = Buffer.allocUnsafe(0);
	#length = 0;

	constructor(readonly maxBytes: number) {}

	/** Bytes of a line that has no end yet. */
	get pendingBytes(): number {
		return this.#length;
	}

	/**
	The lines that this chunk completes; empty ones are left out.

	@throws RangeError when a line is longer than `maxBytes`; TypeError when one is not UTF-8.
	*/
	* push(chunk: Buffer): Generator<string, void, undefined> {
		let start = 0;
		for (let end = chunk.indexOf(LINE_FEED); end !== -1; end = chunk.indexOf(LINE_FEED, start)) {
			const piece = chunk.subarray(start, end);
			start = end + 1;
			let line: Buffer = piece;
			if (this.#length > 0) {
				this.#append(piece);
				line = this.#pending.subarray(0, this.#length);
				this.#pending = Buffer.allocUnsafe(0);
				this.#length = 0;
			}

			if (line.length > this.maxBytes) {
				throw this.#tooLong();
			}

			if (!isUtf8(line)) {
				throw new TypeError('a line is not UTF-8');
			}

			const text = line.toString().trim();
			if (text) {
				yield text;
			}
		}

		this.#append(chunk.subarray(start));
	}

	#append(piece: Buffer): void {
		const length = this.#length + piece.length;
		if (length > this.maxBytes) {
			throw this.#tooLong();
		}

		if (length > this.#pending.length) {
			const grown = Buffer.allocUnsafe(Math.max(length, START_BYTES, 2 * this.#length));
			this.#pending.copy(grown, 0, 0, this.#length);
			this.#pending = grown;
		}

		piece.copy(this.#pending, this.#length);
		this.#length = length;
	}

	#tooLong(): RangeError {
		return new RangeError(`a line is longer than ${this.maxBytes} bytes`);
	}
}
