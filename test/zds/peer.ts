/** A ztunnel of bytes: sends what the test says, shows what came. Encodes by hand, from the .proto. */
import {setTimeout as sleep} from 'node:timers/promises';
import type {ExecutionContext} from 'ava';
import {hasErrno} from '../../src/errors.js';
import {native} from '../../src/native.js';
import {connectSeqpacket} from '../native/helpers.js';

/** A length-delimited field; everything here is shorter than 128 bytes. */
const field = (number: number, content: string) => Buffer.of(number << 3 | 2, content.length / 2).toString('hex') + content;
const text = (number: number, value: string) => field(number, Buffer.from(value).toString('hex'));

export const HELLO = '0801';
export const ACK = field(1, '');
export const nack = (error: string) => field(1, text(1, error));
export const SNAPSHOT_SENT = field(3, '');
export const keep = (uid: string) => field(5, text(1, uid));
export const del = (uid: string) => field(2, text(2, uid));
/** Of the workload that {@link workload} gives. */
export const add = (uid: string) => field(1, text(1, uid) + field(2, text(1, `name-${uid}`) + text(2, 'shop') + text(3, 'account')));

export class Peer {
	#fd: number | undefined;

	private constructor(fd: number) {
		this.#fd = fd;
	}

	static connect(t: ExecutionContext, path: string): Peer {
		const peer = new Peer(connectSeqpacket(path));
		t.teardown(() => {
			peer.close();
		});
		return peer;
	}

	/** Throws EAGAIN when there is no room. */
	send(hex: string): void {
		native.send(this.#fd!, Buffer.from(hex, 'hex'));
	}

	/** What came, as hex; empty at the end, the error's name when it broke, undefined when nothing came in time. */
	async next(timeoutMs = 30_000): Promise<string | undefined> {
		const deadline = performance.now() + timeoutMs;
		for (;;) {
			try {
				return Buffer.from(native.receive(this.#fd!, 4096)).toString('hex');
			} catch (error) {
				if (!hasErrno(error, 'EAGAIN')) {
					return (error as NodeJS.ErrnoException).code;
				}
			}

			if (performance.now() > deadline) {
				return undefined;
			}

			await sleep(1);
		}
	}

	/** Says hello, and acknowledges the whole snapshot. @returns it. */
	async snapshot(): Promise<string[]> {
		this.send(HELLO);
		return this.answer(SNAPSHOT_SENT);
	}

	/** Acknowledges until `last` came, and that too. */
	async answer(last: string): Promise<string[]> {
		const seen: string[] = [];
		while (seen.at(-1) !== last) {
			const packet = await this.next();
			if (!packet) {
				throw new Error(`${packet === '' ? 'the connection ended' : 'nothing came'} after ${seen.join(' ')}`);
			}

			seen.push(packet);
			this.send(ACK);
		}

		return seen;
	}

	close(): void {
		if (this.#fd !== undefined) {
			native.closeFd(this.#fd);
			this.#fd = undefined;
		}
	}
}
