/**
What the agent says about pods: the annotation that tells how a pod is captured, and events. Nobody waits for either.
*/
import {randomBytes} from 'node:crypto';
import {Buffer} from 'node:buffer';
import {performance} from 'node:perf_hooks';
import {reasonOf} from '../errors.js';
import type {KubernetesClient} from './client.js';
import {KubernetesError, KubernetesStatusError} from './errors.js';
import {readMetadata} from './objects.js';
import {Backoff} from './pace.js';

export const REDIRECTION = 'ambient.istio.io/redirection';

/** `pending`: captured, but ztunnel does not serve it yet. */
export type Redirection = 'enabled' | 'pending';

export interface PodIdentity {
	readonly namespace: string;
	readonly name: string;
	readonly uid: string;
}

export interface WriterOptions {
	readonly client: KubernetesClient;
	readonly log: (line: string) => void;
	/** Ends all work. */
	readonly signal: AbortSignal;
	/** See {@link SETTLE_MS} and {@link SILENCE_MS}; shorter in tests. */
	readonly settleMs?: number;
	readonly silenceMs?: number;
}

/** A write shows in what is watched after this at the latest; until then what is watched proves nothing. */
const SETTLE_MS = 10_000;
/** The same event is not reported again for so long. */
const SILENCE_MS = 3_600_000;
const MAX_AT_ONCE = 4;
const MAX_EVENTS = 256;
const MAX_REPORTED = 4096;
/** What the API takes, in bytes. */
const MAX_NOTE_BYTES = 1024;
const MAX_EVENT_NAME = 253;

/** Requests that are tried again and again until they succeed: how long to wait, whom to tell, what to log. */
class Persistence {
	readonly #backoff: Backoff;
	#timer: NodeJS.Timeout | undefined;
	#complaint = '';

	/** @param retry - called when it is time to try again. */
	constructor(readonly options: WriterOptions, readonly what: string, readonly retry: () => void) {
		const {gapMs, maxBackoffMs} = options.client.timing;
		this.#backoff = new Backoff(gapMs, maxBackoffMs);
		options.signal.addEventListener('abort', () => {
			clearTimeout(this.#timer);
		}, {once: true});
	}

	get isWaiting(): boolean {
		return this.#timer !== undefined;
	}

	get isFailing(): boolean {
		return this.#backoff.failures > 0;
	}

	succeeded(): void {
		this.#backoff.reset();
		this.#complaint = '';
		this.options.client.pace.recovered(this.what);
	}

	failed(error: unknown): void {
		this.complain(error);
		if (!(error instanceof KubernetesError) || error.isServerFailure) {
			this.options.client.pace.failed(this.what);
		}

		this.#timer ??= setTimeout(() => {
			this.#timer = undefined;
			this.retry();
		}, this.#backoff.next());
	}

	/** Logs each thing that goes wrong once, not each time. */
	complain(error: unknown): void {
		const complaint = error instanceof KubernetesStatusError ? String(error.status) : error instanceof KubernetesError ? error.kind : 'other';
		if (complaint !== this.#complaint) {
			this.#complaint = complaint;
			this.options.log(`${this.what}: ${reasonOf(error)}`);
		}
	}
}

interface Wish {
	readonly pod: PodIdentity;
	readonly value: Redirection | undefined;
}

/**
Makes the annotation `ambient.istio.io/redirection` of pods what it should be, sooner or later: the latest wish for a pod counts, and is tried again until it is fulfilled, or the
pod is gone.
*/
export class StatusWriter {
	readonly counters = {written: 0, failed: 0, dropped: 0};
	/** By uid; oldest first. Only what is not fulfilled. */
	readonly #wishes = new Map<string, Wish>();
	readonly #inFlight = new Set<string>();
	/** What was written not long ago, by uid, oldest first. */
	readonly #written = new Map<string, {readonly value: Redirection | undefined; readonly atMs: number}>();
	readonly #persistence: Persistence;

	constructor(readonly options: WriterOptions) {
		this.#persistence = new Persistence(options, 'the annotation of pods', () => {
			this.#work();
		});
	}

	/** Wishes that are not fulfilled yet. */
	get pending(): number {
		return this.#wishes.size;
	}

	/**
	Call it as often as you like, e.g. for every pod in every round.

	@param pod - `annotations`, if given, are the pod's as last seen: there is nothing to do where they show `value` already.
	@param value - undefined: the pod shall not have the annotation.
	*/
	set(pod: PodIdentity & {readonly annotations?: Readonly<Record<string, string>>}, value: Redirection | undefined): void {
		const {uid, namespace, name, annotations} = pod;
		const wish = this.#wishes.get(uid);
		if (wish) {
			if (wish.value !== value) {
				this.#wishes.set(uid, {pod: wish.pod, value});
			}

			return;
		}

		this.#forgetOld();
		const written = this.#written.get(uid);
		if (written ? written.value === value : annotations !== undefined && annotations[REDIRECTION] === value) {
			return;
		}

		this.#wishes.set(uid, {pod: {namespace, name, uid}, value});
		this.#work();
	}

	/** The pod is gone. */
	forget(uid: string): void {
		this.#wishes.delete(uid);
		this.#written.delete(uid);
	}

	#work(): void {
		const {signal} = this.options;
		for (const [uid, wish] of this.#wishes) {
			if (signal.aborted || this.#persistence.isWaiting || this.#inFlight.size >= (this.#persistence.isFailing ? 1 : MAX_AT_ONCE)) {
				return;
			}

			if (!this.#inFlight.has(uid)) {
				void this.#fulfil(uid, wish);
			}
		}
	}

	async #fulfil(uid: string, wish: Wish): Promise<void> {
		this.#inFlight.add(uid);
		try {
			const outcome = await this.#write(wish);
			this.counters[outcome]++;
			this.#persistence.succeeded();
			if (outcome === 'dropped') {
				this.forget(uid);
			} else {
				this.#written.delete(uid);
				this.#written.set(uid, {value: wish.value, atMs: performance.now()});
			}

			// It may have been replaced meanwhile.
			if (this.#wishes.get(uid) === wish) {
				this.#wishes.delete(uid);
			}
		} catch (error) {
			if (this.options.signal.aborted) {
				return;
			}

			this.counters.failed++;
			this.#persistence.failed(error);
			const latest = this.#wishes.get(uid);
			if (latest) {
				// To the end: one that always fails must not keep the others waiting.
				this.#wishes.delete(uid);
				this.#wishes.set(uid, latest);
			}
		} finally {
			this.#inFlight.delete(uid);
		}

		this.#work();
	}

	/** @returns `dropped` when that pod is gone. */
	async #write({pod: {namespace, name, uid}, value}: Wish): Promise<'written' | 'dropped'> {
		const {client, signal} = this.options;
		const target = `/api/v1/namespaces/${encodeURIComponent(namespace)}/pods/${encodeURIComponent(name)}`;
		try {
			// With the uid the server refuses to change another pod of the same name.
			await client.patch(`${target}/status`, {metadata: {uid, annotations: {[REDIRECTION]: value ?? null}}}, undefined, {signal});
			return 'written';
		} catch (error) {
			if (!(error instanceof KubernetesStatusError) || ![404, 409, 422].includes(error.status)) {
				throw error;
			}

			// A conflict may also be one with somebody else's write.
			if (error.status === 404 || await this.#isGone(target, uid)) {
				return 'dropped';
			}

			throw error;
		}
	}

	async #isGone(target: string, uid: string): Promise<boolean> {
		try {
			return readMetadata(await this.options.client.get(target, {signal: this.options.signal}))?.uid !== uid;
		} catch (error) {
			if (error instanceof KubernetesStatusError && error.status === 404) {
				return true;
			}

			throw error;
		}
	}

	#forgetOld(): void {
		const now = performance.now();
		for (const [uid, {atMs}] of this.#written) {
			if (now - atMs < (this.options.settleMs ?? SETTLE_MS)) {
				return;
			}

			this.#written.delete(uid);
		}
	}
}

export interface PodEvent {
	readonly type: 'Normal' | 'Warning';
	/** CamelCase, for machines: `CaptureRefused`. */
	readonly reason: string;
	/** For people; cut at 1,024 bytes. */
	readonly message: string;
}

interface QueuedEvent {
	readonly key: string;
	readonly target: string;
	readonly body: object;
}

/** Reports events on pods (events.k8s.io/v1). When there are too many, or the server does not want them, they are lost. */
export class EventWriter {
	readonly counters = {written: 0, failed: 0, lost: 0};
	readonly #queue: QueuedEvent[] = [];
	/** Key → when it was reported, oldest first. */
	readonly #reported = new Map<string, number>();
	readonly #persistence: Persistence;
	#isBusy = false;

	/** @param node - the node's name: who reports. */
	constructor(readonly options: WriterOptions, readonly node: string) {
		this.#persistence = new Persistence(options, 'events on pods', () => {
			void this.#work();
		});
	}

	/** Events that are not written yet. */
	get pending(): number {
		return this.#queue.length;
	}

	/** The same event (pod, reason, message) is written once an hour at most. Never throws. */
	report({namespace, name, uid}: PodIdentity, {type, reason, message}: PodEvent): void {
		const key = JSON.stringify([uid, reason, message]);
		if (this.#wasReported(key) || this.options.signal.aborted) {
			return;
		}

		if (this.#queue.length >= MAX_EVENTS) {
			// The oldest, but for the one that may be on its way.
			const [lost] = this.#queue.splice(1, 1);
			this.#reported.delete(lost!.key);
			this.counters.lost++;
		}

		this.#queue.push({
			key,
			target: `/apis/events.k8s.io/v1/namespaces/${encodeURIComponent(namespace)}/events`,
			body: {
				apiVersion: 'events.k8s.io/v1',
				kind: 'Event',
				// Our own name for it: a second attempt after an answer that was lost makes no second event.
				metadata: {namespace, name: eventName(name)},
				// Six digits after the second, or the server refuses it.
				eventTime: new Date().toISOString().replace('Z', '000Z'),
				reportingController: 'sidestep',
				reportingInstance: this.node,
				action: 'Capture',
				reason,
				type,
				note: cut(message),
				regarding: {apiVersion: 'v1', kind: 'Pod', namespace, name, uid},
			},
		});
		void this.#work();
	}

	async #work(): Promise<void> {
		const {client, signal} = this.options;
		if (this.#isBusy) {
			return;
		}

		this.#isBusy = true;
		for (let event = this.#queue[0]; event && !signal.aborted && !this.#persistence.isWaiting; event = this.#queue[0]) {
			try {
				await client.post(event.target, event.body, {signal});
				this.#queue.shift();
				this.counters.written++;
				this.#persistence.succeeded();
			} catch (error) {
				if (signal.aborted) {
					break;
				}

				this.#fail(error);
			}
		}

		this.#isBusy = false;
	}

	#fail(error: unknown): void {
		if (error instanceof KubernetesStatusError && error.status === 409) {
			// The attempt whose answer was lost.
			this.#queue.shift();
			this.counters.written++;
			return;
		}

		this.counters.failed++;
		if (error instanceof KubernetesError && !error.isServerFailure) {
			this.#persistence.complain(error);
			this.#queue.shift();
			this.counters.lost++;
			return;
		}

		this.#persistence.failed(error);
	}

	#wasReported(key: string): boolean {
		const now = performance.now();
		for (const [old, atMs] of this.#reported) {
			if (now - atMs < (this.options.silenceMs ?? SILENCE_MS) && this.#reported.size <= MAX_REPORTED) {
				break;
			}

			this.#reported.delete(old);
		}

		if (this.#reported.has(key)) {
			return true;
		}

		this.#reported.set(key, now);
		return false;
	}
}

function eventName(pod: string): string {
	const suffix = `.${randomBytes(8).toString('hex')}`;
	return pod.slice(0, MAX_EVENT_NAME - suffix.length).replace(/[^a-z\d]+$/, '') + suffix;
}

function cut(message: string): string {
	const bytes = Buffer.from(message);
	// Half a character at the end becomes U+FFFD, which goes too.
	return bytes.length <= MAX_NOTE_BYTES ? message : `${bytes.subarray(0, MAX_NOTE_BYTES - 6).toString().replace(/\uFFFD+$/, '')}…`;
}
