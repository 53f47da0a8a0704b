/**
When which pod is looked at: at once when something was heard of it, soon again when it failed, and each in its turn although nothing was heard.
*/
import {setImmediate as nextTurn, setTimeout as pause} from 'node:timers/promises';
import type {PodSpec} from '../config/pods-file.js';
import type {Reconciler, Round} from './reconcile.js';

export interface ControlLoopOptions {
	/** All pods there should be, by name; asked at each round. */
	readonly specs: () => ReadonlyMap<string, PodSpec>;
	/** In what time each pod is looked at, and the maps are read, although nothing was heard; {@link quietPeriod} when left out. */
	readonly resyncMs?: number | undefined;
	/** @param changedAt - when the oldest of the changes that it carried out was heard (performance.now()). */
	readonly onRound: (round: Round, durationMs: number, changedAt: number | undefined) => void;
	readonly onError: (error: unknown) => void;
	/** Every pod was looked at once. */
	readonly onSettled?: () => void;
}

/** So that a round leaves the event loop to others after some 50 ms. */
const PODS_PER_ROUND = 32;
const FIRST_RETRY_MS = 250;

/** A look costs 1.0 - 1.6 ms: 0.3 - 0.4 % of a CPU at most. */
const quietPeriod = (pods: number) => Math.max(10_000, pods * 400);

interface Retry {
	readonly delayMs: number;
	readonly at: number;
}

export class ControlLoop {
	/** It turns. */
	isTurning = true;
	/** Every pod was looked at. */
	isSettled = false;
	readonly #due = new Map<string, number | undefined>();
	readonly #retries = new Map<string, Retry>();
	#tour: string[] = [];
	#nextSliceAt = 0;
	#reread = true;
	/** After a round that failed. */
	#pauseMs = 0;
	#pausedUntil = 0;
	#wake = () => {};

	constructor(readonly reconciler: Reconciler, readonly options: ControlLoopOptions) {}

	/** These pods are looked at next. */
	wake(names: Iterable<string>): void {
		for (const name of names) {
			this.#due.set(name, this.#due.get(name) ?? performance.now());
		}

		this.#wake();
	}

	/** Looks at one pod now. @throws as {@link Reconciler.round}. */
	look(name: string): Round {
		const changedAt = this.#due.get(name) ?? performance.now();
		this.#due.delete(name);
		return this.#round(new Set([name]), changedAt);
	}

	/** Until aborted. */
	async run(signal: AbortSignal): Promise<void> {
		const onAbort = () => {
			this.#wake();
		};

		signal.addEventListener('abort', onAbort);
		try {
			while (!signal.aborted) {
				const now = performance.now();
				if (now < this.#pausedUntil) {
					await pause(this.#pausedUntil - now, undefined, {signal}).catch(() => {});
					continue;
				}

				this.#collectDue(now);
				if (this.#due.size === 0 && !this.#reread) {
					if (!this.isSettled) {
						this.isSettled = true;
						this.options.onSettled?.();
					}

					await this.#sleep(signal);
					continue;
				}

				const batch = [...this.#due].slice(0, PODS_PER_ROUND);
				for (const [name] of batch) {
					this.#due.delete(name);
				}

				const changes = batch.map(([, changedAt]) => changedAt).filter(changedAt => changedAt !== undefined);
				try {
					this.#round(new Set(batch.map(([name]) => name)), changes.length > 0 ? Math.min(...changes) : undefined);
					this.#pauseMs = 0;
				} catch (error) {
					for (const [name, changedAt] of batch) {
						this.#due.set(name, this.#due.get(name) ?? changedAt);
					}

					this.#pauseMs = Math.min(this.#pauseMs === 0 ? FIRST_RETRY_MS : this.#pauseMs * 2, this.#period());
					this.#pausedUntil = performance.now() + this.#pauseMs;
					this.options.onError(error);
				}

				await nextTurn();
			}
		} finally {
			signal.removeEventListener('abort', onAbort);
			this.isTurning = false;
		}
	}

	#round(due: ReadonlySet<string>, changedAt: number | undefined): Round {
		const started = performance.now();
		const round = this.reconciler.round(this.options.specs(), due, this.#reread);
		this.#reread = false;
		const now = performance.now();
		for (const name of new Set([...round.looked, ...this.#retries.keys()])) {
			const before = this.#retries.get(name);
			if (!round.failures.has(name)) {
				this.#retries.delete(name);
			} else if (round.looked.has(name) || !before) {
				const delayMs = Math.min(before ? before.delayMs * 2 : FIRST_RETRY_MS, this.#period());
				this.#retries.set(name, {delayMs, at: now + delayMs});
			}
		}

		this.options.onRound(round, now - started, changedAt);
		return round;
	}

	#period(): number {
		return this.options.resyncMs ?? quietPeriod(this.options.specs().size);
	}

	/** The next few of the tour, and failed ones whose time has come. */
	#collectDue(now: number): void {
		for (const [name, {at}] of this.#retries) {
			if (at <= now && !this.#due.has(name)) {
				this.#due.set(name, undefined);
			}
		}

		if (now < this.#nextSliceAt) {
			return;
		}

		if (this.#tour.length === 0) {
			this.#startTour(now);
			this.#reread = true;
		}

		const pods = this.options.specs().size;
		const period = this.#period();
		// At the first time all at once.
		const count = this.isSettled ? Math.max(1, Math.ceil(pods * 50 / period)) : pods;
		for (const name of this.#tour.splice(0, count)) {
			if (!this.#due.has(name)) {
				this.#due.set(name, undefined);
			}
		}

		this.#nextSliceAt = now + (this.#tour.length === 0 && count >= pods ? period : period * count / Math.max(1, pods));
	}

	#startTour(now: number): void {
		this.#tour = [...this.options.specs().keys()];
		this.#nextSliceAt = now + this.#period() / Math.max(1, this.#tour.length);
	}

	async #sleep(signal: AbortSignal): Promise<void> {
		const now = performance.now();
		const next = Math.min(this.#nextSliceAt, ...[...this.#retries.values()].map(({at}) => at));
		await new Promise<void>(resolve => {
			if (signal.aborted || this.#due.size > 0) {
				resolve();
				return;
			}

			const timer = setTimeout(resolve, Math.max(1, next - now));
			this.#wake = () => {
				clearTimeout(timer);
				resolve();
			};
		});
		this.#wake = () => {};
	}
}

