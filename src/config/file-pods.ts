/**
The pods of a file that is watched.
*/
import {readFileSync, statSync, watch, type FSWatcher} from 'node:fs';
import path from 'node:path';
import {isDeepStrictEqual} from 'node:util';
import {InputError, reasonOf} from '../errors.js';
import {parsePodsFile, type PodSpec} from './pods-file.js';

/** A file that is replaced makes several events. */
const SETTLE_MS = 20;
/** For what no event tells of: the directory was replaced, or is on a file system without events. */
const RESYNC_MS = 10_000;

export class FilePods {
	#specs: ReadonlyMap<string, PodSpec>;
	#problem: string | undefined;
	#watcher: FSWatcher | undefined;
	#timer: NodeJS.Timeout | undefined;

	/** @throws InputError when the file cannot be read or does not parse. */
	constructor(readonly file: string) {
		this.#specs = read(file);
	}

	get specs(): ReadonlyMap<string, PodSpec> {
		return this.#specs;
	}

	/** Why the file is not what is in force. */
	get problems(): readonly string[] {
		return this.#problem === undefined ? [] : [this.#problem];
	}

	/**
	@param onChange - called with the names of pods that are new, gone, or others than before.
	@param onProblem - called when the file cannot be used; the last good one stays in force.
	*/
	start(onChange: (names: ReadonlySet<string>) => void, onProblem: (problem: string) => void): void {
		const look = () => {
			this.#wait(look, RESYNC_MS);
			try {
				const specs = read(this.file);
				const names = new Set([...this.#specs.keys(), ...specs.keys()].filter(name => !isDeepStrictEqual(this.#specs.get(name), specs.get(name))));
				this.#specs = specs;
				this.#problem = undefined;
				if (names.size > 0) {
					onChange(names);
				}
			} catch (error) {
				const problem = `${reasonOf(error)} (the last good pods file stays in force)`;
				if (this.#problem !== problem) {
					onProblem(problem);
				}

				this.#problem = problem;
			}
		};

		const soon = () => {
			this.#wait(look, SETTLE_MS);
		};

		// The directory, as a file that is replaced by rename (editors, Kubernetes' volumes with their symbolic links) is a new file each time.
		this.#watcher = watch(path.dirname(path.resolve(this.file)), soon);
		// The directory itself may be removed; the resync goes on reading.
		this.#watcher.on('error', soon);
		this.#wait(look, RESYNC_MS);
	}

	close(): void {
		this.#watcher?.close();
		clearTimeout(this.#timer);
	}

	#wait(act: () => void, ms: number): void {
		clearTimeout(this.#timer);
		this.#timer = setTimeout(act, ms);
	}
}

function read(file: string): ReadonlyMap<string, PodSpec> {
	let text: string;
	try {
		// Reading a fifo would wait for its writer.
		if (!statSync(file).isFile()) {
			throw new TypeError('it is not a regular file');
		}

		text = readFileSync(file, 'utf8');
	} catch (error) {
		throw new InputError(file, `cannot be read (${reasonOf(error)})`, {cause: error});
	}

	return new Map(parsePodsFile(text, file).map(spec => [spec.name, spec]));
}
