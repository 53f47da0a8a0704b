/**
One ztunnel's connection: hello first, then one request at a time, each with a deadline. Whatever is not as it should be ends it; ztunnel connects again by itself.
*/
import {hasErrno, reasonOf} from '../errors.js';
import type {SeqpacketConnection} from '../native.js';
import {VERSION_V1, decodeAck, decodeHello} from './messages.js';

export const DROP_REASONS = [
	/** It closed the connection. */
	'ended',
	/** The connection broke: ztunnel died with unread packets, mostly. */
	'broken',
	/** No hello in time. */
	'silent',
	/** Another version of the protocol. */
	'version',
	/** No answer in time. */
	'unanswered',
	/** No room to send: it does not read. */
	'full',
	/** A packet that is none of the protocol's. */
	'malformed',
	'oversized',
	/** An answer to nothing. */
	'unexpected',
] as const;
export type DropReason = typeof DROP_REASONS[number];

export const KINDS = ['add', 'keep', 'delete', 'snapshot'] as const;
export type Kind = typeof KINDS[number];

export interface Request {
	readonly kind: Kind;
	/** undefined for the snapshot's end. */
	readonly uid?: string;
}

/** ztunnel's word about a workload. */
export type Verdict =
	/** Its listeners are bound. */
	| {readonly kind: 'acknowledged'}
	| {readonly kind: 'refused'; readonly error: string};

/** What a ztunnel was last told of a workload. */
export interface Told {
	readonly revision: number;
	/** Of the namespace that it was given; undefined when it was none. */
	readonly cookie: bigint | undefined;
	verdict?: Verdict;
}

export interface ConnectionEvents {
	onHello(): void;
	/** @param error - ztunnel's, empty for success. */
	onAck(request: Request, error: string): void;
	/** It is closed. Not for {@link Connection.close}. */
	onDrop(reason: DropReason, detail: string): void;
}

/** ztunnel's word goes into one line of the log and an annotation. */
const ERROR_MAX = 300;

export class Connection {
	readonly since = new Date();
	readonly pid: number;
	/** By uid. */
	readonly told = new Map<string, Told>();
	hasSaidHello = false;
	isSnapshotSent = false;
	readonly #toLookAt = new Set<string>();
	#outstanding: Request | undefined;
	#isClosed = false;
	#deadline: NodeJS.Timeout;

	/** @throws the kernel's error when the socket cannot be used. */
	constructor(readonly socket: SeqpacketConnection, readonly ackTimeoutMs: number, readonly events: ConnectionEvents) {
		this.pid = socket.peer.pid;
		socket.read({
			onPacket: (bytes, isTruncated) => {
				this.#onPacket(bytes, isTruncated);
			},
			onEnd: error => {
				this.#drop(error ? 'broken' : 'ended', error ? `is gone (${reasonOf(error)})` : 'has disconnected');
			},
		});
		// Last, as what throws before would leave it running.
		this.#deadline = setTimeout(() => {
			this.#drop('silent', `was dropped: it did not say hello in ${ackTimeoutMs} ms`);
		}, ackTimeoutMs);
	}

	get title(): string {
		return `ztunnel (pid ${this.pid})`;
	}

	get isIdle(): boolean {
		return this.hasSaidHello && !this.#outstanding && !this.#isClosed;
	}

	get isSnapshotDone(): boolean {
		return this.isSnapshotSent && this.#outstanding?.kind !== 'snapshot';
	}

	/** Notes workloads that may have to be told of. */
	look(uids: Iterable<string>): void {
		for (const uid of uids) {
			this.#toLookAt.add(uid);
		}
	}

	/** The next of them. */
	next(): string | undefined {
		for (const uid of this.#toLookAt) {
			this.#toLookAt.delete(uid);
			return uid;
		}

		return undefined;
	}

	/**
	Only when idle.

	@returns false when it failed, which ended the connection.
	*/
	send(request: Request, bytes: Uint8Array, fd?: number): boolean {
		try {
			this.socket.send(bytes, fd);
		} catch (error) {
			const isFull = hasErrno(error, 'EAGAIN');
			this.#drop(isFull ? 'full' : 'broken', isFull ? 'was dropped: it does not read what it is sent' : `is gone (${reasonOf(error)})`);
			return false;
		}

		this.#outstanding = request;
		this.#deadline = setTimeout(() => {
			this.#drop('unanswered', `was dropped: it did not answer "${request.kind}"${request.uid === undefined ? '' : ` of workload ${request.uid}`} in ${this.ackTimeoutMs} ms`);
		}, this.ackTimeoutMs);
		return true;
	}

	close(): void {
		this.#isClosed = true;
		clearTimeout(this.#deadline);
		this.socket.close();
	}

	#onPacket(bytes: Uint8Array, isTruncated: boolean): void {
		if (isTruncated) {
			this.#drop('oversized', `was dropped: it sent a packet of more than ${bytes.length} bytes`);
			return;
		}

		const decoded = this.#decode(bytes);
		if (decoded === undefined) {
			return;
		}

		if (typeof decoded === 'number') {
			this.#onHello(decoded);
		} else {
			this.#onAnswer(decoded);
		}
	}

	/** @returns the version of a hello, which comes first, or the error of an answer; undefined when it is neither, and the connection was dropped. */
	#decode(bytes: Uint8Array): number | string | undefined {
		try {
			return this.hasSaidHello ? decodeAck(bytes) : decodeHello(bytes);
		} catch (error) {
			this.#drop('malformed', `was dropped: what it sent is not understood (${reasonOf(error)})`);
			return undefined;
		}
	}

	#onHello(version: number): void {
		if (version !== VERSION_V1) {
			this.#drop('version', `was dropped: it speaks version ${version} of the protocol, and only ${VERSION_V1} is known here`);
			return;
		}

		clearTimeout(this.#deadline);
		this.hasSaidHello = true;
		this.events.onHello();
	}

	#onAnswer(error: string): void {
		const request = this.#outstanding;
		if (!request) {
			this.#drop('unexpected', 'was dropped: it answered what nobody asked');
			return;
		}

		clearTimeout(this.#deadline);
		this.#outstanding = undefined;
		this.events.onAck(request, error.replaceAll(/\s+/g, ' ').slice(0, ERROR_MAX));
	}

	#drop(reason: DropReason, detail: string): void {
		if (!this.#isClosed) {
			this.close();
			this.events.onDrop(reason, detail);
		}
	}
}
