/**
The file of a unix socket that we listen at. If somebody removes it, puts another in its place or makes its directory anew, nobody can connect any more, and the
kernel does not say so.
*/
import {lstatSync, rmSync} from 'node:fs';
import {reasonOf} from './errors.js';

const CHECK_MS = 5000;

export interface SocketFileOptions {
	/** In a sentence, as `the CNI socket`. */
	readonly title: string;
	readonly path: string;
	/** Listens there anew. What is there and is not dead is not touched: then it throws. */
	readonly open: () => void | Promise<void>;
	/** Look this often; default 5000. */
	readonly checkMs?: number | undefined;
	readonly log: (line: string) => void;
}

export class SocketFile {
	/** Why nobody can connect now. */
	problem: string | undefined;
	readonly #options: SocketFileOptions;
	#identity: string | undefined;
	#timer: NodeJS.Timeout | undefined;
	#isLooking = false;
	#isClosed = false;

	constructor(options: SocketFileOptions) {
		this.#options = options;
	}

	/** Call it when the file was made. From now on it is made again when it is not ours any more, or {@link problem} says why it cannot be. */
	lookAfter(): void {
		const {path, checkMs = CHECK_MS} = this.#options;
		this.#identity = identityOf(path);
		this.#timer = setInterval(async () => this.#look(), checkMs).unref();
	}

	/** Nothing is made after that. */
	close(): void {
		this.#isClosed = true;
		clearInterval(this.#timer);
	}

	/** Unless it is somebody else's by now. */
	remove(): void {
		const {path, log} = this.#options;
		try {
			if (this.#isOurs()) {
				rmSync(path);
			}
		} catch (error) {
			log(`${path} is left behind (${reasonOf(error)})`);
		}
	}

	/** Never throws. */
	async #look(): Promise<void> {
		const {title, path, open} = this.#options;
		// To listen may take longer than until the next look.
		if (this.#isLooking) {
			return;
		}

		this.#isLooking = true;
		try {
			if (!this.#isOurs()) {
				await open();
				this.#identity = identityOf(path);
				this.#tell(undefined, `${title} ${path} was gone: made again`);
			} else if (this.problem !== undefined) {
				this.#tell(undefined, `${title} ${path} can be reached again`);
			}
		} catch (error) {
			this.#tell(reasonOf(error), reasonOf(error));
		} finally {
			this.#isLooking = false;
		}
	}

	/** Each thing once. */
	#tell(problem: string | undefined, line: string): void {
		if (!this.#isClosed && (problem === undefined || problem !== this.problem)) {
			this.#options.log(line);
		}

		this.problem = problem;
	}

	#isOurs(): boolean {
		return this.#identity !== undefined && identityOf(this.#options.path) === this.#identity;
	}
}

/** undefined when nothing is there. */
function identityOf(path: string): string | undefined {
	const stat = lstatSync(path, {bigint: true, throwIfNoEntry: false});
	return stat && `${stat.dev}:${stat.ino}`;
}
