/**
A cache of one kind of object that follows the API server: list, then watch, whatever happens in between.
*/
import {performance} from 'node:perf_hooks';
import {isDeepStrictEqual} from 'node:util';
import {reasonOf} from '../errors.js';
import {statusError, type KubernetesClient, type WatchEvent} from './client.js';
import {KubernetesClosedEarlyError, KubernetesError, KubernetesProtocolError, describeRequest, type FailureKind} from './errors.js';
import {keyOf, readMetadata, type KubernetesObject, type Metadata} from './objects.js';
import {Backoff, pause} from './pace.js';

export interface ReflectorOptions<T extends KubernetesObject> {
	readonly client: KubernetesClient;
	/** The collection: `/api/v1/pods`. */
	readonly path: string;
	/** Of what to list and watch: `{fieldSelector: 'spec.nodeName=node-1'}`. */
	readonly query?: Readonly<Record<string, string>>;
	/** What is kept of an object, as little as possible; undefined for one that is not wanted. Must not throw. */
	readonly transform: (object: unknown) => T | undefined;
	/**
	Called with the keys of objects that came, went or changed (in what `transform` keeps of them), once for all that happened in a turn of the event loop, and not again
	before it has returned. For the first time after the first list, then with all keys there are. A key may stand for a pod that went and another one of its
	name that came.
	*/
	readonly onChange: (keys: ReadonlySet<string>) => void | Promise<void>;
	readonly log: (line: string) => void;
	readonly timing?: Partial<ReflectorTiming>;
}

export interface ReflectorTiming {
	/** A watch without a whole event (bookmarks come every minute) for so long is dead. @default 300,000 */
	readonly inactivityMs: number;
	/** A watch that was open for so long was a good one. @default 5,000 */
	readonly steadyMs: number;
	/** A watch is asked to last between this and twice this. @default 300 */
	readonly watchSeconds: number;
	/** Objects a page. @default 100 */
	readonly pageSize: number;
}

export const REFLECTOR_TIMING: ReflectorTiming = {inactivityMs: 300_000, steadyMs: 5000, watchSeconds: 300, pageSize: 100};

export interface ReflectorCounters {
	/** Pages asked for, watches begun, events taken. */
	pages: number;
	lists: number;
	watches: number;
	events: number;
	bookmarks: number;
	/** Events older than what the cache had. */
	outdated: number;
	/** Objects without name or uid. */
	dropped: number;
	readonly errors: Record<FailureKind, number>;
}

/** A list that is longer does not end. */
const MAX_PAGES = 1000;
/** Deleted objects whose version is remembered, so that a late event does not bring them back. */
const MAX_DELETED = 1024;
/** After so many answers in a row that were no good, the version may be what is wrong (an event that cannot be read, a cluster restored from a backup): list. */
const BAD_WATCHES = 5;

export class Reflector<T extends KubernetesObject> {
	readonly counters: ReflectorCounters = {
		pages: 0, lists: 0, watches: 0, events: 0, bookmarks: 0, outdated: 0, dropped: 0,
		errors: {connection: 0, timeout: 0, protocol: 0, refused: 0, server: 0, gone: 0, closed_early: 0},
	};

	readonly #options: ReflectorOptions<T>;
	readonly #timing: ReflectorTiming;
	readonly #backoff: Backoff;
	readonly #source: string;
	readonly #items = new Map<string, T>();
	readonly #versions = new Map<string, string>();
	readonly #deleted = new Map<string, string>();
	readonly #changed = new Set<string>();
	/** Where the next watch starts; undefined: list first. */
	#version: string | undefined;
	/** The version of the last list: nothing older is news. */
	#listed = '';
	#isSynced = false;
	#isTelling = false;
	#mustTell = false;
	#badWatches = 0;
	#lastContactMs: number | undefined;
	#caughtUpMs: number | undefined;
	#complaint: {readonly kind: FailureKind; readonly text: string} | undefined;

	constructor(options: ReflectorOptions<T>) {
		this.#options = options;
		this.#timing = {...REFLECTOR_TIMING, ...options.timing};
		this.#source = `reflector ${options.path}`;
		this.#backoff = new Backoff(options.client.timing.gapMs, options.client.timing.maxBackoffMs);
	}

	/** By `namespace/name`, or name. The same map for good; it changes between turns of the event loop. */
	get items(): ReadonlyMap<string, T> {
		return this.#items;
	}

	/** The first list is in {@link items}. */
	get isSynced(): boolean {
		return this.#isSynced;
	}

	/** When the server last said something that was understood, on the clock of `performance.now()`. */
	get lastContactMs(): number | undefined {
		return this.#lastContactMs;
	}

	/** When the server last had nothing older to tell: after a list, and at bookmarks. On the clock of `performance.now()`. */
	get caughtUpMs(): number | undefined {
		return this.#caughtUpMs;
	}

	/** What went wrong last, until a watch was steady again. */
	get problem(): string | undefined {
		return this.#complaint?.text;
	}

	/** Follows the server until `signal` aborts; then resolves, and `onChange` is not called any more. Never rejects. */
	async run(signal: AbortSignal): Promise<void> {
		while (!signal.aborted) {
			try {
				if (this.#version === undefined) {
					await this.#list(signal);
				}

				await this.#watch(signal);
			} catch (error) {
				if (signal.aborted) {
					break;
				}

				this.#note(error);
				await pause(this.#backoff.next(), signal).catch(() => {});
			}
		}

		this.#options.client.pace.recovered(this.#source);
	}

	async #list(signal: AbortSignal): Promise<void> {
		const {client, path, query} = this.#options;
		const found = new Map<string, {readonly object: T; readonly version: string}>();
		let version = '';
		let next = '';
		for (let page = 0; page === 0 || next; page++) {
			// No resourceVersion: what is true now. From the server's cache (resourceVersion=0) a pod that exists could be missing, and would lose its capture.
			const parameters = new URLSearchParams({...query, limit: String(this.#timing.pageSize), ...(next ? {continue: next} : {})});
			const target = `${path}?${parameters.toString()}`;
			this.counters.pages++;
			const answer = await client.request({method: 'GET', target}, {signal});
			const list = readList(answer, target);
			// The first page's: events from there on mend what later pages show of a later time.
			version ||= list.version;
			for (const item of list.items) {
				const metadata = this.#readMetadata(item);
				const object = metadata && this.#options.transform(item);
				if (object) {
					found.set(keyOf(metadata), {object, version: metadata.resourceVersion});
				}
			}

			if (page === MAX_PAGES || (list.next && list.next === next)) {
				throw new KubernetesProtocolError(describeRequest('GET', target), 'its pages do not end');
			}

			next = list.next;
		}

		this.counters.lists++;
		this.#lastContactMs = performance.now();
		this.#caughtUpMs = this.#lastContactMs;
		this.#version = version;
		this.#listed = version;
		this.#deleted.clear();
		for (const key of this.#items.keys()) {
			if (!found.has(key)) {
				this.#remove(key);
			}
		}

		for (const [key, {object, version}] of found) {
			this.#put(key, object, version);
		}

		if (!this.#isSynced) {
			this.#isSynced = true;
			this.#tell(signal);
		} else if (this.#changed.size > 0) {
			this.#tell(signal);
		}
	}

	async #watch(signal: AbortSignal): Promise<void> {
		const {client, path, query} = this.#options;
		const {watchSeconds, steadyMs, inactivityMs} = this.#timing;
		const timeoutSeconds = Math.ceil(watchSeconds * (1 + Math.random()));
		const parameters = new URLSearchParams({...query, watch: '1', allowWatchBookmarks: 'true', resourceVersion: this.#version!, timeoutSeconds: String(timeoutSeconds)});
		const target = `${path}?${parameters.toString()}`;
		const what = describeRequest('GET', target);
		let openedAt = performance.now();
		let steadyTimer: NodeJS.Timeout | undefined;
		this.counters.watches++;
		try {
			await client.watch(target, event => {
				this.#take(event, what, signal);
			}, {
				signal, inactivityMs,
				onOpen: () => {
					openedAt = performance.now();
					this.#lastContactMs = openedAt;
					steadyTimer = setTimeout(() => {
						this.#steady();
					}, steadyMs);
				},
			});
		} finally {
			clearTimeout(steadyTimer);
		}

		const openMs = performance.now() - openedAt;
		if (openMs < steadyMs) {
			throw new KubernetesClosedEarlyError(what, openMs);
		}
	}

	#steady(): void {
		this.#backoff.reset();
		this.#badWatches = 0;
		this.#options.client.pace.recovered(this.#source);
		if (this.#complaint) {
			this.#complaint = undefined;
			this.#options.log(`following ${this.#options.path} again`);
		}
	}

	#take({type, object}: WatchEvent, what: string, signal: AbortSignal): void {
		if (type === 'ERROR') {
			throw statusError(what, object);
		}

		if (type === 'BOOKMARK') {
			const {resourceVersion} = ((object as {metadata?: unknown} | null)?.metadata ?? {}) as {readonly resourceVersion?: unknown};
			if (typeof resourceVersion === 'string' && isOlder(resourceVersion, this.#version ?? '')) {
				throw statusError(what, {code: 410, reason: 'Expired', message: `its versions went back from ${this.#version} to ${resourceVersion}: was it restored from a backup?`});
			}

			this.#lastContactMs = performance.now();
			this.#caughtUpMs = this.#lastContactMs;
			this.counters.bookmarks++;
			this.#advance(typeof resourceVersion === 'string' ? resourceVersion : '');
			return;
		}

		if (type !== 'ADDED' && type !== 'MODIFIED' && type !== 'DELETED') {
			throw new KubernetesProtocolError(what, `it sent an event of the unknown type '${type.slice(0, 50)}'`);
		}

		this.#lastContactMs = performance.now();
		this.counters.events++;
		const metadata = this.#readMetadata(object);
		if (metadata === undefined) {
			return;
		}

		const {resourceVersion: version} = metadata;
		const key = keyOf(metadata);
		this.#advance(version);
		if (this.#isOutdated(key, version, type)) {
			this.counters.outdated++;
			return;
		}

		const kept = type === 'DELETED' ? undefined : this.#options.transform(object);
		if (kept) {
			this.#put(key, kept, version);
		} else {
			this.#remove(key, version);
		}

		if (this.#changed.size > 0) {
			this.#tell(signal);
		}
	}

	#isOutdated(key: string, version: string, type: string): boolean {
		const known = this.#versions.get(key);
		// A deletion may carry the version that the object had.
		return isOlder(version, this.#listed)
			|| (known !== undefined && (isOlder(version, known) || (version === known && version !== '' && type !== 'DELETED')))
			|| isOlderOrSame(version, this.#deleted.get(key));
	}

	#advance(version: string): void {
		if (version && !isOlder(version, this.#version ?? '')) {
			this.#version = version;
		}
	}

	#put(key: string, object: T, version: string): void {
		this.#versions.set(key, version);
		this.#deleted.delete(key);
		if (!isDeepStrictEqual(this.#items.get(key), object)) {
			this.#items.set(key, object);
			this.#changed.add(key);
		}
	}

	#remove(key: string, version?: string): void {
		this.#versions.delete(key);
		if (this.#items.delete(key)) {
			this.#changed.add(key);
		}

		if (version) {
			this.#deleted.delete(key);
			this.#deleted.set(key, version);
			if (this.#deleted.size > MAX_DELETED) {
				this.#deleted.delete(this.#deleted.keys().next().value!);
			}
		}
	}

	#readMetadata(object: unknown): Metadata | undefined {
		const metadata = readMetadata(object);
		if (metadata === undefined) {
			this.counters.dropped++;
		}

		return metadata;
	}

	/** Calls onChange in the next turn, unless a call is under way: then after it. */
	#tell(signal: AbortSignal): void {
		this.#mustTell = true;
		if (!this.#isTelling) {
			this.#isTelling = true;
			setImmediate(() => {
				void this.#tellAll(signal);
			});
		}
	}

	async #tellAll(signal: AbortSignal): Promise<void> {
		while (this.#mustTell && !signal.aborted) {
			this.#mustTell = false;
			const keys = new Set(this.#changed);
			this.#changed.clear();
			try {
				await this.#options.onChange(keys);
			} catch (error) {
				this.#options.log(`a change of ${this.#options.path} was not carried out (${reasonOf(error)})`);
			}
		}

		this.#isTelling = false;
	}

	#note(error: unknown): void {
		const {client, log, path} = this.#options;
		client.pace.failed(this.#source);
		const kind = error instanceof KubernetesError ? error.kind : 'protocol';
		this.counters.errors[kind]++;
		const isAnswer = kind === 'protocol' || kind === 'refused' || kind === 'server';
		if (kind === 'gone' || (isAnswer && ++this.#badWatches >= BAD_WATCHES)) {
			this.#badWatches = 0;
			this.#version = undefined;
		}

		const text = `following ${path}: ${reasonOf(error)}`;
		// Once for each thing that goes wrong, not for each time.
		if (this.#complaint?.kind !== kind) {
			log(text);
		}

		this.#complaint = {kind, text};
	}
}

/** @throws KubernetesProtocolError for what is no list. */
function readList(answer: unknown, target: string): {readonly items: readonly unknown[]; readonly version: string; readonly next: string} {
	const {items, metadata} = (typeof answer === 'object' && answer !== null ? answer : {}) as {readonly items?: unknown; readonly metadata?: Record<string, unknown>};
	const version = metadata?.['resourceVersion'];
	const next = metadata?.['continue'] ?? '';
	// Go writes an empty list as null.
	if (!(Array.isArray(items) || items === null) || typeof version !== 'string' || !version || typeof next !== 'string') {
		throw new KubernetesProtocolError(describeRequest('GET', target), 'its answer is not a list with a version');
	}

	return {items: items as readonly unknown[] | null ?? [], version, next};
}

/** Whether version `a` is known to be from before version `b`. Versions are opaque, but those of one resource that are numbers can be compared. */
function isOlder(a: string, b: string): boolean {
	return isNumber(a) && isNumber(b) && (a.length === b.length ? a < b : a.length < b.length);
}

function isOlderOrSame(a: string, b: string | undefined): boolean {
	return b !== undefined && b !== '' && (a === b || isOlder(a, b));
}

function isNumber(version: string): boolean {
	return /^[1-9]\d*$/.test(version);
}
