/**
How fast a server is asked that does not do what it is asked.
*/
import {setMaxListeners} from 'node:events';
import {performance} from 'node:perf_hooks';

/** Full jitter: each delay is drawn from 0 to a bound that doubles with every failure. */
export class Backoff {
	#failures = 0;

	constructor(readonly baseMs: number, readonly maxMs: number) {}

	get failures(): number {
		return this.#failures;
	}

	next(): number {
		return Math.random() * Math.min(this.maxMs, this.baseMs * 2 ** this.#failures++);
	}

	reset(): void {
		this.#failures = 0;
	}
}

export interface PaceOptions {
	/** Least time between two requests while something fails. */
	readonly gapMs: number;
	/** The longest that a server can make us wait by Retry-After. */
	readonly maxWaitMs: number;
	/** When a failure that nobody mentions again is forgotten. Longer than any loop waits between two attempts. */
	readonly forgetMs: number;
}

interface Waiter {
	readonly start: () => void;
}

/**
Shared by everything that sends requests to one server. While all goes well, requests start at once. While any of the *sources* (a reflector, a writer, …) fails, all
requests queue and start `gapMs` apart. A new server counts as failing until it has answered once.
*/
export class Pace {
	/** Source → when its failure is forgotten. */
	readonly #failing = new Map<string, number>([['start', Number.POSITIVE_INFINITY]]);
	readonly #waiters = new Set<Waiter>();
	#lastStart = Number.NEGATIVE_INFINITY;
	#notBefore = Number.NEGATIVE_INFINITY;
	#timer: NodeJS.Timeout | undefined;

	constructor(readonly options: PaceOptions) {}

	get isHealthy(): boolean {
		const now = performance.now();
		for (const [source, until] of this.#failing) {
			if (until <= now) {
				this.#failing.delete(source);
			}
		}

		return this.#failing.size === 0;
	}

	get waiting(): number {
		return this.#waiters.size;
	}

	/** Resolves when a request may start. First come, first served. */
	async admit(signal?: AbortSignal): Promise<void> {
		signal?.throwIfAborted();
		if (signal) {
			// One signal ends the whole agent; many that wait for it are no leak.
			setMaxListeners(0, signal);
		}

		await new Promise<void>((resolve, reject) => {
			const leave = () => {
				this.#waiters.delete(waiter);
				this.#arm();
				reject(signal!.reason as Error);
			};

			const waiter = {
				start() {
					signal?.removeEventListener('abort', leave);
					resolve();
				},
			};
			signal?.addEventListener('abort', leave, {once: true});
			this.#waiters.add(waiter);
			this.#arm();
		});
	}

	/** The server has answered something. */
	answered(): void {
		this.recovered('start');
	}

	failed(source: string): void {
		this.#failing.set(source, performance.now() + this.options.forgetMs);
	}

	recovered(source: string): void {
		if (this.#failing.delete(source)) {
			this.#arm();
		}
	}

	/** The server asks to be left alone. */
	waitFor(retryAfterMs: number): void {
		this.#notBefore = Math.max(this.#notBefore, performance.now() + Math.min(retryAfterMs, this.options.maxWaitMs));
	}

	/** Starts who may start, and sets the timer for the next. */
	#arm(): void {
		clearTimeout(this.#timer);
		for (const waiter of this.#waiters) {
			const now = performance.now();
			const waitMs = Math.max(this.#notBefore, this.isHealthy ? 0 : this.#lastStart + this.options.gapMs) - now;
			if (waitMs > 0) {
				this.#timer = setTimeout(() => {
					this.#arm();
				}, Math.ceil(waitMs));
				return;
			}

			this.#lastStart = now;
			this.#waiters.delete(waiter);
			waiter.start();
		}
	}
}

/** Rejects with the signal's reason when it aborts. */
export async function pause(ms: number, signal: AbortSignal): Promise<void> {
	signal.throwIfAborted();
	await new Promise<void>((resolve, reject) => {
		const abort = () => {
			clearTimeout(timer);
			reject(signal.reason as Error);
		};

		const timer = setTimeout(() => {
			signal.removeEventListener('abort', abort);
			resolve();
		}, ms);
		signal.addEventListener('abort', abort, {once: true});
	});
}
